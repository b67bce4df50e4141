// The Mallows link with Kendall's distance: log g(z; a), a = -log phi, and its derivatives.
//
// With C(t) = t / (e^t - 1), K(t) = -C'(t) in (0, 1/2] and r = |z|, the probability of the losing side is the mean of
// K over one rank:
//   q(r, a) = 1 - g(r) = (C(ar) - C(ar + a)) / a = int_0^1 K(a (r + s)) ds.
// Derivatives:
//   dq/dr = a Q1,   dq/da = r Q1 + Q2,   d2q/drda = (r + 1) K'(ar + a) - r K'(ar),
//   Q1 = int K'(a (r + s)) ds = (K(ar + a) - K(ar)) / a,   Q2 = int s K'(a (r + s)) ds = (K(ar + a) - q) / a.
// Inside |z| < smoothing the link is the odd cubic about 1/2 that meets g in value and slope at the ends: g jumps at
// 0, and the Mallows model defines it at whole rank differences only.
//
// Real is double for results in float, double-double (Wide) for results good to a few units in the last place of a
// double: C and K lose digits as t -> 0, the differences as a -> 0 (there the integrals take over), and e^-(ar) needs
// every digit of ar. That factor is carried apart, so that log q and its derivatives stay finite where q underflows.
#pragma once

#include "double_double.h"

namespace mallowspo {

struct LinkValue {
  double log_prob, d_margin, d_dispersion;
};

namespace detail {

// Below these t and a the series and the integrals have more digits.
template <class Real>
constexpr double small_t = sizeof(Real) == sizeof(double) ? 0x1p-4 : 0x1p-12;
template <class Real>
constexpr double small_a = sizeof(Real) == sizeof(double) ? 0x1p-4 : 0x1p-10;

// C, K and K', each times e^t, and 1/2 - K, which vanishes as t -> 0.
template <class Real>
struct RankCurve {
  Real c, k, k1, half_minus_k;
};

// w = 1 - e^-t, which has digits of its own as t -> 0.
template <class Real>
MALLOWSPO_FN RankCurve<Real> rank_curve(Real t, Real w) {
  const Real down = Real(1) - w;
  if (double(t) < small_t<Real>) {  // the Taylor series of C and its derivatives: Bernoulli numbers over factorials
    const Real x = t * t, one = 1, up = one / down;
    const Real c = one - t / 2 + x * (one / 12 - x * (one / 720 - x * (one / 30240 - x / 1209600)));
    const Real half_minus_k = t * (one / 6 - x * (one / 180 - x * (one / 5040 - x / 151200)));
    const Real minus_k1 = one / 6 - x * (one / 60 - x * (one / 1008 - x / 21600));
    return {up * c, up * (Real(0.5) - half_minus_k), -(up * minus_k1), half_minus_k};
  }
  const Real c = t / w, k = (c - 1) / w;
  return {c, k, (Real(2) - c * (down + 1)) / (w * w), Real(0.5) - down * k};
}

// q, Q1, Q2 and d2q/drda, each over the decay e^-(ar), and 1/2 - q.
template <class Real>
struct RankMeans {
  Decay<Real> decay;
  Real q, q1, q2, q_ra, half_minus_q;
};

template <class Real>
MALLOWSPO_FN RankMeans<Real> rank_means(Real r, double a) {
  const Real u = r * a;
  RankMeans<Real> out{decay_of(u), 0, 0, 0, 0, 0};
  const Real w = complement_of(out.decay), down = Real(1) - w;
  const Real v = complement_of(decay_of(Real(a))), step = Real(1) - v;
  const RankCurve<Real> near = rank_curve(u, w), far = rank_curve<Real>(u + a, w + down * v);
  const Real far_k = step * far.k, far_k1 = step * far.k1;
  out.q_ra = far_k1 + r * (far_k1 - near.k1);
  if (a < small_a<Real>) {  // three-point Gauss-Legendre: its error is below a^5 / 2e6
    for (int i = -1; i <= 1; ++i) {
      const Real s = Real(0.5) + i * 0.38729833462074168852, weight = (i == 0 ? Real(8) : Real(5)) / 18, t = s * a;
      const Real v_s = complement_of(decay_of(t)), scale = weight * (Real(1) - v_s);
      const RankCurve<Real> c = rank_curve<Real>(u + t, w + down * v_s);
      out.q = out.q + scale * c.k;
      out.q1 = out.q1 + scale * c.k1;
      out.q2 = out.q2 + scale * s * c.k1;
      out.half_minus_q = out.half_minus_q + weight * c.half_minus_k;
    }
    return out;
  }
  out.q = (near.c - step * far.c) / a;
  out.q1 = (far_k - near.k) / a;
  out.q2 = (far_k - out.q) / a;
  out.half_minus_q = Real(0.5) - down * out.q;
  return out;
}

// The probability q 2^exponent of the losing side, its logarithm, and the derivatives of that in r and, times
// 2^-exponent_a, in a. The exponents come last: a product of which one factor is subnormal would have lost its digits.
template <class Real>
struct Losing {
  Real q;
  int exponent;
  double log_q;
  Real d_r, d_a;
  int exponent_a;
};

template <class Real>
MALLOWSPO_FN Losing<Real> losing_side(Real r, double a) {
  const RankMeans<Real> m = rank_means(r, a);
  const Real q = (m.decay.excess + 1) * 0x1p-12 * m.q;  // q over the decay may be 2000, d_a near the largest double
  const Real slope = m.q1 / m.q, d_a = r * slope + m.q2 / m.q;
  return {q, m.decay.exponent + 12, double(Real(log_of(m.q)) - r * a), slope * a, d_a, 0};
}

// gap = smoothing - r > 0, with all its digits.
template <class Real>
MALLOWSPO_FN Losing<Real> smoothed_losing_side(Real r, Real gap, double a, double smoothing) {
  RankMeans<Real> m{{0, 0}, 0, 0, 0, 0, 0.5};  // q and its derivatives are 0 at the far end
  if (a * smoothing < far_decay) m = rank_means(Real(smoothing), a);
  const Real decay = value_of(m.decay);  // where it underflows, the other terms make up the sums
  const Real x = r / smoothing, y = gap / smoothing, x_plus_1 = x + 1, slope = m.q1 * a;
  // 1/2 - the cubic, in a form whose terms are all positive: no cancellation where the losing probability is small.
  const Real end = x * (Real(3) - x * x) / 2, tangent = x * y * x_plus_1 / 2;
  const Real q = y * y * (x + 2) / 4 + decay * (m.q * end - slope * smoothing * tangent);
  const Real q_r = decay * slope * (x * x * 3 - 1) / 2 - m.half_minus_q * 1.5 / smoothing * y * x_plus_1;
  const Real q_a = (m.decay.excess + 1) * ((m.q1 + m.q2 / smoothing) * end - m.q_ra * tangent);  // over smoothing
  int exponent;
  const double fraction = ::frexp(smoothing, &exponent);
  return {q, 0, log_of(q), q_r / q, q_a / q * fraction, m.decay.exponent + exponent};
}

}  // namespace detail

// log g(z; a) with d/dz and d/da, for finite a >= 0 and smoothing >= 0. What exceeds the largest finite number, z too,
// counts as that number. A NaN in z or a gives NaN.
template <class Real>
MALLOWSPO_FN LinkValue mallows_link(detail::Wide z, double a, double smoothing) {
  using namespace detail;
  constexpr double largest = 1.7976931348623157e308;
  if (z.hi != z.hi || a != a) return {z.hi + a, z.hi + a, z.hi + a};
  if (z.hi == 0 && smoothing == 0) {  // g(0) = 1/2 by definition; the slope is that of both one-sided limits
    return {-0.69314718055994530942, -2 * double(rank_means<Real>(0, a).q1 * a), 0};
  }
  const bool ahead = z.hi > 0;
  Wide r = z.hi < 0 ? -z : z;
  if (r.hi > largest) r = largest;
  const Wide gap = Wide(smoothing) - r;
  if (gap.hi <= 0) {  // far out the asymptotes are exact to rounding
    const double u = r.hi * a;
    if (ahead && u > far_decay) return {0, 0, 0};
    if (u > 1e20) return {-::fmin(u, largest), a, -r.hi};
  }
  const Losing<Real> lose =
      gap.hi > 0 ? smoothed_losing_side(Real(r), Real(gap), a, smoothing) : losing_side(Real(r), a);
  if (!ahead) return {lose.log_q, double(-lose.d_r), double(scaled(lose.d_a, lose.exponent_a))};
  const Real q = scaled(lose.q, lose.exponent), odds = lose.q / (Real(1) - q);
  return {log_of_one_minus(q), double(scaled(-odds * lose.d_r, lose.exponent)),
          double(scaled(-odds * lose.d_a, lose.exponent + lose.exponent_a))};
}

}  // namespace mallowspo
