// The loss of one preference pair and its derivatives, in double: r is the log-ratio of a response, s(r) its score
// under the divergence (r itself for the reverse KL), z = beta (s(r_w) - s(r_l)) - gamma the margin, a = -log phi the
// neg-log dispersion.
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
  exo = 7,
  mallows_exo = 8,
  discopop = 9,
  mallows_discopop = 10,
  // What follows has no margin: it is a sum over the two responses.
  sppo = 11,
  nca = 12,
  bco = 13,
  apo_zero = 14,
  apo_down = 15,
};
constexpr int64_t link_count = 16;

MALLOWSPO_FN bool has_margin(Link link) { return link < Link::sppo; }

// The link whose margin the plug-in multiplies by 2 a; a link that is none is its own host.
MALLOWSPO_FN Link host_of(Link link) {
  switch (link) {
    case Link::mallows_theta: return Link::bradley_terry;
    case Link::mallows_ipo: return Link::ipo;
    case Link::mallows_hinge: return Link::hinge;
    case Link::mallows_exo: return Link::exo;
    case Link::mallows_discopop: return Link::discopop;
    default: return link;
  }
}

MALLOWSPO_FN bool uses_dispersion(Link link) { return link == Link::mallows_phi || link != host_of(link); }

// _C.Divergence; `alpha` covers the reverse KL at alpha 1 and the forward KL at 0.
enum class Divergence : int64_t { alpha = 0, jensen_shannon = 1 };
constexpr int64_t divergence_count = 2;

struct Objective {
  Link link;
  double beta, gamma, label_smoothing, smoothing;
  bool robust;
  double focal_gamma;
  bool clip_rejected;
  Divergence divergence;
  double divergence_alpha, discopop_tau;
};

struct PairLoss {
  double loss, d_chosen, d_rejected, d_dispersion;  // the derivatives in the two log-ratios and in a
};

// Margins are double-double: e^-x would turn the rounding of x into x units in the last place. `exact` has no meaning
// where it overflows; there the double does.
MALLOWSPO_FN detail::Wide margin_or(double plain, detail::Wide exact) { return ::fabs(plain) < 1e300 ? exact : plain; }

struct Value {
  double value, slope;
};

// log sigmoid(x) and its slope sigmoid(-x).
MALLOWSPO_FN Value log_sigmoid(detail::Wide x) {
  const bool ahead = x.hi >= 0;
  const double e_hi = ::exp(-::fabs(x.hi)), e = ::fma(e_hi, ahead ? -x.lo : x.lo, e_hi);
  return {ahead ? -::log1p(e) : x.hi - (::log1p(e) - x.lo), (ahead ? e : 1) / (1 + e)};
}

// s(r) = f'(e^r) of the f-divergence that regularises, its constant chosen so that s(0) = 0: r for the reverse KL,
// (e^((alpha - 1) r) - 1) / (alpha - 1), log 2 + log sigmoid(r) for Jensen-Shannon's.
MALLOWSPO_FN Value score(double r, const Objective& o) {
  if (o.divergence == Divergence::jensen_shannon) {
    const Value v = log_sigmoid(r);
    return {r < -1 ? 0.69314718055994530942 + v.value : -::log1p(::expm1(-r) / 2), v.slope};
  }
  const double k = o.divergence_alpha - 1;
  if (k == 0) return {r, 1};
  constexpr double cap = 80;  // beyond, the score stays: no float32 gradient could be made of it
  const double t = k * r;
  return {::expm1(t >= cap ? cap : t) / k, t >= cap ? 0 : ::exp(t)};  // NaN stays NaN
}

// p log(p / q), the limit 0 at p = 0.
MALLOWSPO_FN double relative(double p, double log_p, double log_q) { return p == 0 ? 0 : p * (log_p - log_q); }

// Log-likelihood that the first response wins (or what a link puts in its place), as a function of the margin x.
MALLOWSPO_FN Value host_likelihood(Link host, detail::Wide x, const Objective& o) {
  switch (host) {
    case Link::bradley_terry: return log_sigmoid(x);
    case Link::ipo: {
      const double off = (x.hi - 0.5) + x.lo;
      return {-off * off, -2 * off};
    }
    case Link::hinge: {
      const double off = (x.hi - 1) + x.lo;
      return {off >= 0 ? 0 : off, off < 0 ? 1.0 : 0.0};  // NaN stays NaN, infinity does not become it
    }
    case Link::exo: {  // -KL(sigmoid(x) || 1 - eps); as accurate as its larger part
      const double log_keep = ::log1p(-o.label_smoothing), log_swap = ::log(o.label_smoothing);
      const Value win = log_sigmoid(x), lose = log_sigmoid(-x);
      const double p = lose.slope, q = win.slope, pq = p * q;
      const double slope = pq == 0 ? 0 : pq * ((x.hi - (log_keep - log_swap)) + x.lo);
      return {-relative(p, win.value, log_keep) - relative(q, lose.value, log_swap), -slope};
    }
    default: {  // discopop: the logistic and the exponential loss, mixed by m = sigmoid(x / tau)
      constexpr double largest = 1.7976931348623157e308;
      if (::fabs(x.hi) > largest) x = x.hi < 0 ? -largest : largest;
      const double tau = o.discopop_tau;
      const Value win = log_sigmoid(x), mix = log_sigmoid(x.hi / tau);
      const double m = ::exp(mix.value), rest = mix.slope, mixed = ::exp(mix.value - x.hi);  // m e^-x, in one piece
      const double d_m = m * rest / tau, d_mixed = mixed * (rest / tau - 1);
      return {rest * win.value - mixed, rest * win.slope - d_m * win.value - d_mixed};
    }
  }
}

// As a function of z; all links but mallows-phi are their host at the margin z or 2 a z (design: the dispersion is a
// plug-in). The focal modulation p^gamma log p is differentiated; 1 + gamma log p is as accurate as its larger part.
template <class Real>
MALLOWSPO_FN LinkValue log_likelihood(detail::Wide z, double a, const Objective& o) {
  LinkValue out;
  if (o.link == Link::mallows_phi) {
    out = mallows_link<Real>(z, a, o.smoothing);
  } else {
    const bool plug_in = uses_dispersion(o.link);
    const double factor = plug_in ? 2 * a : 1;
    const Value v = host_likelihood(host_of(o.link), margin_or(factor * z.hi, z * factor), o);
    out = {v.value, factor * v.slope, plug_in && v.slope != 0 ? 2 * z.hi * v.slope : 0};
  }
  if (o.focal_gamma == 0) return out;
  const double p = ::exp(o.focal_gamma * out.log_prob), by = p * (1 + o.focal_gamma * out.log_prob);
  if (p == 0) return {0, 0, 0};
  return {p * out.log_prob, by * out.d_margin, by * out.d_dispersion};
}

// The links without a margin, as functions of x = beta r of either response.
MALLOWSPO_FN PairLoss separate_loss(double won, double lost, const Objective& o) {
  const double beta = o.beta;
  const detail::Wide x_w = margin_or(beta * won, detail::Wide(beta) * won);
  const detail::Wide x_l = margin_or(beta * lost, detail::Wide(beta) * lost);
  const Value on_w = log_sigmoid(x_w), off_w = log_sigmoid(-x_w), on_l = log_sigmoid(x_l), off_l = log_sigmoid(-x_l);
  const double step_w = on_w.slope * off_w.slope, step_l = on_l.slope * off_l.slope;  // slopes of the sigmoids
  switch (o.link) {
    case Link::sppo: {
      const double off = (x_w.hi - 0.5) + x_w.lo, over = (x_l.hi + 0.5) + x_l.lo;
      return {off * off + over * over, 2 * beta * off, 2 * beta * over, 0};
    }
    case Link::nca:
      return {-on_w.value - (off_w.value + off_l.value) / 2, beta * (off_w.slope / 2 - on_w.slope),
              beta * off_l.slope / 2, 0};
    case Link::bco: return {-on_w.value - off_l.value, -beta * on_w.slope, beta * off_l.slope, 0};
    case Link::apo_zero: return {on_w.slope + off_l.slope, -beta * step_w, beta * step_l, 0};
    default: {  // apo_down
      const double h = won - lost;
      const detail::Wide x = margin_or(beta * h, detail::Wide(beta) * h);
      const double lose = log_sigmoid(x).slope, step = lose * log_sigmoid(-x).slope;
      return {off_w.slope + lose, beta * (step_w - step), beta * step, 0};
    }
  }
}

// Conservative smoothing mixes the loss with that of the flipped pair; robust smoothing is its unbiased correction.
// The mixed derivatives, and the robust loss, are differences: they are as accurate as their larger part.
template <class Real>
MALLOWSPO_FN PairLoss pair_loss(double won, double lost, double a, const Objective& o) {
  if (!has_margin(o.link)) return separate_loss(won, lost, o);
  const Value s_w = score(won, o);
  Value s_l = score(lost, o);
  if (o.clip_rejected && lost <= 0) s_l = {0, 0};
  const double h = s_w.value - s_l.value;
  const detail::Wide z = margin_or(o.beta * h - o.gamma, detail::Wide(o.beta) * h - o.gamma);
  const LinkValue win = log_likelihood<Real>(z, a, o);
  PairLoss out{-win.log_prob, -o.beta * win.d_margin, 0, -win.d_dispersion};
  const double eps = o.label_smoothing;
  if (eps != 0 && host_of(o.link) != Link::exo) {
    const LinkValue flip = log_likelihood<Real>(-z, a, o);
    const double scale = o.robust ? 1 / (1 - 2 * eps) : 1;
    const double keep = (1 - eps) * scale, swap = (o.robust ? -eps : eps) * scale;
    out = {-keep * win.log_prob - swap * flip.log_prob, o.beta * (swap * flip.d_margin - keep * win.d_margin), 0,
           -keep * win.d_dispersion - swap * flip.d_dispersion};
  }
  out.d_rejected = -s_l.slope * out.d_chosen;
  out.d_chosen *= s_w.slope;
  return out;
}

}  // namespace mallowspo
