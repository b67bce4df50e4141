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

// Log-likelihood that the first response wins, as a function of z; theta, mallows-ipo and mallows-hinge are their host
// at the margin 2 a z (design: the dispersion is a plug-in).
MALLOWSPO_FN LinkValue log_likelihood(Link link, double z, double a, double smoothing) {
  if (link == Link::mallows_phi) return mallows_link(z, a, smoothing);
  const bool plug_in = uses_dispersion(link);
  const double factor = plug_in ? 2 * a : 1, x = factor * z;
  double value, slope;
  if (link == Link::bradley_terry || link == Link::mallows_theta) {
    const double e = ::exp(-::fabs(x));
    value = ::fmin(x, 0.0) - ::log1p(e);
    slope = (x >= 0 ? e : 1) / (1 + e);
  } else if (link == Link::ipo || link == Link::mallows_ipo) {
    value = -(x - 0.5) * (x - 0.5);
    slope = -2 * (x - 0.5);
  } else {
    value = x < 1 ? x - 1 : x >= 1 ? 0 : x;  // NaN stays NaN, infinity does not become it
    slope = x < 1 ? 1 : 0;
  }
  return {value, factor * slope, plug_in ? 2 * z * slope : 0};
}

// Conservative smoothing mixes the loss with that of the flipped pair; robust smoothing is its unbiased correction.
MALLOWSPO_FN PairLoss pair_loss(double h, double a, const Objective& o) {
  const double z = o.beta * h - o.gamma, eps = o.label_smoothing;
  const LinkValue win = log_likelihood(o.link, z, a, o.smoothing);
  if (eps == 0) return {-win.log_prob, -o.beta * win.d_margin, -win.d_dispersion};
  const LinkValue flip = log_likelihood(o.link, -z, a, o.smoothing);
  const double scale = o.robust ? 1 / (1 - 2 * eps) : 1;
  const double keep = (1 - eps) * scale, swap = (o.robust ? -eps : eps) * scale;
  return {-keep * win.log_prob - swap * flip.log_prob, o.beta * (swap * flip.d_margin - keep * win.d_margin),
          -keep * win.d_dispersion - swap * flip.d_dispersion};
}

}  // namespace mallowspo
