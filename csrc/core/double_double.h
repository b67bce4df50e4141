// Double-double arithmetic: a number as the unevaluated sum of two doubles, about 104 bits, for what one would round.
// Errors are below 2^-100 of the operands, so a difference may cancel forty bits and still round correctly to double.
// No operand may overflow: infinity minus infinity is NaN in the low part.
// A compiler that contracts a * b + c into one rounding does no harm: the error terms of products are by fma, and sums
// have nothing to contract.
#pragma once

#include "defs.h"

namespace mallowspo::detail {

struct Wide {
  double hi, lo;  // hi is the sum, rounded
  MALLOWSPO_HOST_DEVICE Wide(double x = 0) : hi(x), lo(0) {}
  MALLOWSPO_HOST_DEVICE Wide(double high, double low) : hi(high), lo(low) {}
  MALLOWSPO_HOST_DEVICE explicit operator double() const { return hi; }
};

// a + b where |a| >= |b|.
MALLOWSPO_FN Wide sum_ordered(double a, double b) {
  const double s = a + b;
  return {s, b - (s - a)};
}

MALLOWSPO_FN Wide sum(double a, double b) {
  const double s = a + b, t = s - a;
  return {s, (a - (s - t)) + (b - t)};
}

MALLOWSPO_FN Wide operator-(Wide a) { return {-a.hi, -a.lo}; }

MALLOWSPO_FN Wide operator+(Wide a, Wide b) {
  const Wide s = sum(a.hi, b.hi);
  return sum_ordered(s.hi, s.lo + (a.lo + b.lo));
}

MALLOWSPO_FN Wide operator-(Wide a, Wide b) { return a + -b; }

MALLOWSPO_FN Wide operator*(Wide a, Wide b) {
#if defined(__CUDA_ARCH__)
  const double p = __dmul_rn(a.hi, b.hi);  // never contracted: below it must be the same number twice
#else
  const double p = a.hi * b.hi;
#endif
  return sum_ordered(p, ::fma(a.hi, b.hi, -p) + (a.hi * b.lo + a.lo * b.hi));
}

MALLOWSPO_FN Wide operator/(Wide a, Wide b) {
  const double q = a.hi / b.hi;
  return sum_ordered(q, (a - b * q).hi / b.hi);
}

// From here on for plain doubles as well, where their digits do.

// x 2^exponent; that of a double is rounded once, into the subnormal range too.
MALLOWSPO_FN double scaled(double x, int exponent) { return ::ldexp(x, exponent); }
MALLOWSPO_FN Wide scaled(Wide x, int exponent) { return {::ldexp(x.hi, exponent), ::ldexp(x.lo, exponent)}; }

MALLOWSPO_FN double log_of(Wide x) { return ::log(x.hi) + x.lo / x.hi; }
MALLOWSPO_FN double log_of(double x) { return ::log(x); }
MALLOWSPO_FN double log_of_one_minus(Wide x) { return ::log1p(-x.hi) - x.lo / (1 - x.hi); }
MALLOWSPO_FN double log_of_one_minus(double x) { return ::log1p(-x); }

// e^-t = (1 + excess) 2^exponent.
template <class Real>
struct Decay {
  Real excess;
  int exponent;
};

constexpr double far_decay = 2000;  // e^-2000 times any double is 0

// For 0 <= t <= far_decay. 0 for t < 0.34, where excess is e^-t - 1 to all digits.
MALLOWSPO_FN int decay_exponent(double t) { return -static_cast<int>(::rint(t * 1.4426950408889634074)); }

// For t >= 0. Past far_decay it is that of far_decay, so that the exponent fits an int.
MALLOWSPO_FN Decay<double> decay_of(double t) {
  if (t > far_decay) t = far_decay;
  const int exponent = decay_exponent(t);
  return {::expm1(-::fma(static_cast<double>(exponent), 0.69314718055994530942, t)), exponent};
}

MALLOWSPO_FN Decay<Wide> decay_of(Wide t) {
  const Wide log_2{0.69314718055994530942, 2.3190468138462995584e-17};
  if (t.hi > far_decay) t = far_decay;
  const int exponent = decay_exponent(t.hi);
  Wide f = -(t + log_2 * exponent);
  f = {f.hi / 64, f.lo / 64};  // exact
  // Taylor: |f| < 0.0055, the twelfth term is below 2^-110 of the first; from the seventh on a double is enough.
  double small = 1;
  for (int n = 11; n >= 7; --n) small = 1 + f.hi * small / n;
  Wide tail = small;
  for (int n = 6; n >= 2; --n) tail = f * tail / n + 1;
  Wide excess = f * tail;
  for (int i = 0; i < 6; ++i) excess = excess * (excess + 2);
  return {excess, exponent};
}

// e^-t, 0 where it underflows, and 1 - e^-t to all digits as t -> 0.
template <class Real>
MALLOWSPO_FN Real value_of(Decay<Real> d) {
  return (d.excess + 1) * ::ldexp(1.0, d.exponent);
}
template <class Real>
MALLOWSPO_FN Real complement_of(Decay<Real> d) {
  return d.exponent == 0 ? -d.excess : Real(1) - value_of(d);
}

}  // namespace mallowspo::detail
