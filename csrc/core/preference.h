// The loss of one preference pair and its derivatives, in double: h is the difference of the two log-ratios,
// z = beta h - gamma the margin, a = -log phi the neg-log dispersion.
#pragma once

#include "mallows_link.h"

namespace mallowspo {

// Python sees these through mallowspo._C.Link; the values are part of the operators' schema.
enum class Link : int64_t {
  bradley_terry = 0,
  mallows_theta = 1,
  mallows_phi = 2,
  ipo = 3,
  mallows_ipo = 4,
  hinge = 5,
  mallows_hinge = 6,
};
constexpr int64_t link_count = 7;

MALLOWSPO_FN bool uses_dispersion(Link link) {
  return link == Link::mallows_theta || link == Link::mallows_phi || link == Link::mallows_ipo ||
         link == Link::mallows_hinge;
}

struct Objective {
  Link link;
  double beta, gamma, label_smoothing, smoothing;
  bool robust;
};

struct PairLoss {
  double loss, d_margin, d_dispersion;  // d_margin is the derivative in h
};

// Margins are double-double: e^-x would turn the rounding of x into x units in the last place. `exact` has no meaning
// where it overflows; there the double does.
MALLOWSPO_FN detail::Wide margin_or(double plain, detail::Wide exact) { return ::fabs(plain) < 1e300 ? exact : plain; }

// Log-likelihood that the first response wins, as a function of z; theta, mallows-ipo and mallows-hinge are their host
// at the margin 2 a z (design: the dispersion is a plug-in).
MALLOWSPO_FN LinkValue log_likelihood(Link link, detail::Wide z, double a, double smoothing) {
  if (link == Link::mallows_phi) return mallows_link(z, a, smoothing);
  const bool plug_in = uses_dispersion(link);
  const double factor = plug_in ? 2 * a : 1;
  const detail::Wide x = margin_or(factor * z.hi, z * factor);
  double value, slope;
  if (link == Link::bradley_terry || link == Link::mallows_theta) {
    const bool ahead = x.hi >= 0;
    const double e_hi = ::exp(-::fabs(x.hi)), e = ::fma(e_hi, ahead ? -x.lo : x.lo, e_hi);
    value = ahead ? -::log1p(e) : x.hi - (::log1p(e) - x.lo);
    slope = (ahead ? e : 1) / (1 + e);
  } else if (link == Link::ipo || link == Link::mallows_ipo) {
    const double off = (x.hi - 0.5) + x.lo;
    value = -off * off;
    slope = -2 * off;
  } else {
    const double off = (x.hi - 1) + x.lo;
    value = off >= 0 ? 0 : off;  // NaN stays NaN, infinity does not become it
    slope = off < 0 ? 1 : 0;
  }
  return {value, factor * slope, plug_in && slope != 0 ? 2 * z.hi * slope : 0};
}

// Conservative smoothing mixes the loss with that of the flipped pair; robust smoothing is its unbiased correction.
// The mixed derivatives, and the robust loss, are differences: they are as accurate as their larger part.
MALLOWSPO_FN PairLoss pair_loss(double h, double a, const Objective& o) {
  const detail::Wide z = margin_or(o.beta * h - o.gamma, detail::Wide(o.beta) * h - o.gamma);
  const double eps = o.label_smoothing;
  const LinkValue win = log_likelihood(o.link, z, a, o.smoothing);
  if (eps == 0) return {-win.log_prob, -o.beta * win.d_margin, -win.d_dispersion};
  const LinkValue flip = log_likelihood(o.link, -z, a, o.smoothing);
  const double scale = o.robust ? 1 / (1 - 2 * eps) : 1;
  const double keep = (1 - eps) * scale, swap = (o.robust ? -eps : eps) * scale;
  return {-keep * win.log_prob - swap * flip.log_prob, o.beta * (swap * flip.d_margin - keep * win.d_margin),
          -keep * win.d_dispersion - swap * flip.d_dispersion};
}

}  // namespace mallowspo
