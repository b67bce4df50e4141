// The Mallows link with Kendall's distance: log g(z; a), a = -log phi, and its derivatives, in double.
//
// With C(t) = t / (e^t - 1), K(t) = -C'(t) in (0, 1/2] and r = |z|, the probability of the losing side is the mean of K
// over one rank:
//   q(r, a) = 1 - g(r) = (C(ar) - C(ar + a)) / a = int_0^1 K(a (r + s)) ds.
// The integral has no cancellation for small a, the difference none for large a; both carry the factor e^-(ar) apart, so
// that log q stays finite where q underflows. Derivatives:
//   dq/dr = a Q1,   dq/da = r Q1 + Q2,   Q1 = int K'(a (r + s)) ds,   Q2 = int s K'(a (r + s)) ds.
// Inside |z| < smoothing the link is the odd cubic about 1/2 that meets g in value and slope at the ends, because g jumps
// at 0 and the Mallows model defines it at whole rank differences only.
#pragma once

#include "defs.h"

namespace mallowspo {

struct LinkValue {
  double log_prob, d_margin, d_dispersion;
};

namespace detail {

// K and its first two derivatives, each times e^t, and 1/2 - K, which the smoothed part needs as t -> 0.
struct RankCurve {
  double k, k1, k2, half_minus_k;
};

MALLOWSPO_FN RankCurve rank_curve(double t) {
  if (t < 2.0) {
    // B_2j / (2j)!, the Taylor coefficients of C; radius 2 pi, so at t = 2 each term is a tenth of the one before.
    constexpr double c[] = {8.3333333333333333333e-2,  -1.3888888888888888889e-3, 3.3068783068783068783e-5,
                            -8.2671957671957671958e-7, 2.0876756987868098979e-8,  -5.2841901386874931848e-10,
                            1.3382536530684678833e-11, -3.3896802963225828668e-13, 8.5860620562778445641e-15,
                            -2.174868698558061873e-16, 5.5090028283602295152e-18, -1.3954464685812523341e-19,
                            3.5347070396294674717e-21, -8.9535174270375468504e-23, 2.2679524523376830603e-24,
                            -5.7447906688722024453e-26, 1.4551724756148649019e-27, -3.6859949406653101782e-29,
                            9.336734257095044672e-31,  -2.3650224157006299346e-32, 5.9906717624821343047e-34,
                            -1.5174548844682902617e-35};
    constexpr int terms = static_cast<int>(sizeof(c) / sizeof(c[0]));
    const double x = t * t;
    double m = 0, k1 = 0, k2 = 0;
    for (int j = terms; j >= 1; --j) {
      const double n = 2.0 * j;
      m = m * x + n * c[j - 1];
      k1 = k1 * x + n * (n - 1) * c[j - 1];
      if (j > 1) k2 = k2 * x + n * (n - 1) * (n - 2) * c[j - 1];
    }
    const double up = ::exp(t);
    return {up * (0.5 - t * m), -up * k1, -up * t * k2, t * m};
  }
  const double down = ::exp(-t), w = -::expm1(-t), n = t * (1 + down) - 2 * w;
  const double k = (t - w) / (w * w);
  return {k, -n / (w * w * w), (n * (1 + 2 * down) - w * (w - t * down)) / (w * w * w * w), 0.5 - down * k};
}

// The integrals over one rank: q, Q1, Q2 and dQ1/da, each times e^(ar), and 1/2 - q.
struct RankMeans {
  double q, q1, q2, q1_da, half_minus_q;
};

MALLOWSPO_FN RankMeans rank_means(double r, double a) {
  const double u = a * r;
  if (a < 2.0) {
    // Ten-point Gauss-Legendre on [0, 1]: the nearest pole, 2 pi i, leaves an error below 1e-20.
    constexpr double half_node[] = {0.074437169490815605442, 0.2166976970646235954, 0.33970478414951220312,
                                    0.43253168334449225537, 0.48695326425858586004};
    constexpr double weight[] = {0.14776211235737643509, 0.13463335965499817755, 0.109543181257991022,
                                 0.074725674575290296573, 0.033335672154344068797};
    RankMeans sum{0, 0, 0, 0, 0};
    for (int i = 0; i < 10; ++i) {
      const double s = i % 2 ? 0.5 + half_node[i / 2] : 0.5 - half_node[i / 2];
      const RankCurve c = rank_curve(u + a * s);
      const double w = weight[i / 2] * ::exp(-a * s);
      sum.q += w * c.k;
      sum.q1 += w * c.k1;
      sum.q2 += w * s * c.k1;
      sum.q1_da += w * (r + s) * c.k2;
      sum.half_minus_q += weight[i / 2] * c.half_minus_k;
    }
    return sum;
  }
  const RankCurve near = rank_curve(u), far = rank_curve(u + a);
  const double decay = ::exp(-a);
  const double d_near = u > 0 ? -u / ::expm1(-u) : 1.0, d_far = -(u + a) / ::expm1(-(u + a));
  RankMeans out;
  out.q = (d_near - decay * d_far) / a;
  out.q1 = (decay * far.k - near.k) / a;
  out.q2 = (decay * far.k - out.q) / a;
  out.q1_da = ((r + 1) * decay * far.k1 - r * near.k1 - out.q1) / a;
  out.half_minus_q = 0.5 - ::exp(-u) * out.q;
  return out;
}

// q, log q, and the derivatives of log q in r = |z| and in a.
struct Losing {
  double q, log_q, d_r, d_a;
};

// e^-(ar) with the rounding error of the product ar put back: it would cost ar ulp.
MALLOWSPO_FN double decay_of(double r, double a) {
  const double u = a * r;
  if (u > 1e3) return 0;
  return ::exp(-u) * (1 - ::fma(a, r, -u));
}

MALLOWSPO_FN Losing losing_side(double r, double a) {
  const double u = a * r;
  // Past this u the asymptote log q = -u is exact to rounding, and u itself must not overflow.
  if (u > 1e18) return {0, -::fmin(u, 1.7e308), -a, -r};
  const RankMeans m = rank_means(r, a);
  return {decay_of(r, a) * m.q, -u + ::log(m.q), a * m.q1 / m.q, r * (m.q1 / m.q) + m.q2 / m.q};
}

MALLOWSPO_FN Losing smoothed_losing_side(double r, double a, double smoothing) {
  // Past the same bound as above q and its derivatives are 0, and their factors must not overflow.
  const RankMeans m = a * smoothing > 1e18 ? RankMeans{0, 0, 0, 0, 0.5} : rank_means(smoothing, a);
  const double scale = decay_of(smoothing, a), x = r / smoothing;
  const double q = scale * m.q, slope = -scale * a * m.q1;
  const double q_da = scale * (smoothing * m.q1 + m.q2), slope_da = -scale * (m.q1 + a * m.q1_da);
  // The cubic in a form whose terms are all positive: no cancellation where the losing probability is small.
  const double end = x * (3 - x * x) / 2, tangent = smoothing * x * (1 - x) * (1 + x) / 2;
  const double prob = (1 - x) * (1 - x) * (2 + x) / 4 + q * end + slope * tangent;
  const double d_r = -(1.5 * m.half_minus_q / smoothing * (1 - x) * (1 + x) + slope * (3 * x * x - 1) / 2);
  return {prob, ::log(prob), d_r / prob, (q_da * end + slope_da * tangent) / prob};
}

}  // namespace detail

// log g(z; a) with d/dz and d/da, for a >= 0 and smoothing >= 0. A NaN in z or a gives NaN.
MALLOWSPO_FN LinkValue mallows_link(double z, double a, double smoothing) {
  const double r = ::fabs(z);
  if (r == 0 && smoothing == 0) {  // g(0) = 1/2 by definition; the slope is that of both one-sided limits
    return {-0.69314718055994530942, -2 * (a * detail::rank_means(0, a).q1), 0};
  }
  const detail::Losing lose = r >= smoothing ? detail::losing_side(r, a) : detail::smoothed_losing_side(r, a, smoothing);
  if (z < 0) return {lose.log_q, -lose.d_r, lose.d_a};
  const double odds = lose.q / (1 - lose.q);
  return {::log1p(-lose.q), -odds * lose.d_r, -odds * lose.d_a};
}

}  // namespace mallowspo
