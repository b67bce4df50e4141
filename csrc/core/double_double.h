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

// x 2^exponent, rounded to double once, into the subnormal range too.
MALLOWSPO_FN double scaled(Wide x, int exponent) { return ::ldexp(x.hi, exponent); }

// e^-t = (1 + excess) 2^exponent.
struct Decay {
  Wide excess;
  int exponent;
};

constexpr double far_decay = 2000;  // e^-2000 times any double is 0

// For t >= 0. The exponent is 0 for t < 0.34, where excess is e^-t - 1 to all digits. Past far_decay it is that of
// far_decay, so that the exponent fits an int.
MALLOWSPO_FN Decay decay_of(Wide t) {
  const Wide log_2{0.69314718055994530942, 2.3190468138462995584e-17};
  if (t.hi > far_decay) t = far_decay;
  const int exponent = -static_cast<int>(::rint(t.hi * 1.4426950408889634074));
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
MALLOWSPO_FN Wide value_of(Decay d) { return (d.excess + 1) * ::ldexp(1.0, d.exponent); }
MALLOWSPO_FN Wide complement_of(Decay d) { return d.exponent == 0 ? -d.excess : Wide(1) - value_of(d); }

MALLOWSPO_FN double log_of(Wide x) { return ::log(x.hi) + x.lo / x.hi; }
MALLOWSPO_FN double log_of_one_minus(Wide x) { return ::log1p(-x.hi) - x.lo / (1 - x.hi); }

}  // namespace mallowspo::detail
