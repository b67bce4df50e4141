// One element of the per-pair operators, for the CPU loop and the CUDA thread alike.
#pragma once

#include <type_traits>

#include "rows.h"

namespace mallowspo {

// NaN for what is no neg-log dispersion. The CPU operators name such a value and raise before they come here; on CUDA
// that would have to wait for the device, so the pair turns NaN.
MALLOWSPO_FN double checked_dispersion(double a) { return a >= 0 && a <= 1.7976931348623157e308 ? a : ::nan(""); }

template <class T>
MALLOWSPO_FN double element(const void* tensor, int64_t i) {
  return tensor ? static_cast<double>(static_cast<const T*>(tensor)[i]) : 0.0;
}

template <class T>
MALLOWSPO_FN void set_element(void* tensor, int64_t i, double value) {
  static_cast<T*>(tensor)[i] = static_cast<T>(value);
}

// What T can hold of it: a |z| and its derivatives may exceed the finite numbers of float.
template <class T>
MALLOWSPO_FN double saturated(double x) {
  constexpr double largest = sizeof(T) == 4 ? 3.4028234663852886e38 : 1.7976931348623157e308;
  return x < -largest ? -largest : x > largest ? largest : x;
}

// What the Mallows link is computed in, for results in T.
template <class T>
using Arithmetic = std::conditional_t<sizeof(T) == sizeof(double), detail::Wide, double>;

template <class T>
MALLOWSPO_FN void preference_loss_at(const PairArgs& args, int64_t i) {
  const double won = element<T>(args.chosen, i) - element<T>(args.ref_chosen, i);
  const double lost = element<T>(args.rejected, i) - element<T>(args.ref_rejected, i);
  const double a = checked_dispersion(element<T>(args.dispersion, i));
  const PairLoss pair = pair_loss<Arithmetic<T>>(won, lost, a, args.objective);
  set_element<T>(args.losses, i, pair.loss);
  set_element<T>(args.chosen_rewards, i, args.objective.beta * won);
  set_element<T>(args.rejected_rewards, i, args.objective.beta * lost);
  set_element<T>(args.slopes, i, saturated<T>(pair.d_chosen));
  set_element<T>(args.slopes, i + args.pairs, saturated<T>(pair.d_rejected));
  set_element<T>(args.slopes, i + 2 * args.pairs, saturated<T>(pair.d_dispersion));
}

template <class T>
MALLOWSPO_FN void mallows_log_prob_at(const MallowsArgs& args, int64_t i) {
  const double a = checked_dispersion(element<T>(args.dispersion, i));
  const LinkValue v = mallows_link<Arithmetic<T>>(element<T>(args.margin, i), a, args.smoothing);
  set_element<T>(args.log_probs, i, saturated<T>(v.log_prob));
  set_element<T>(args.slopes, i, saturated<T>(v.d_margin));
  set_element<T>(args.slopes, i + args.count, saturated<T>(v.d_dispersion));
}

}  // namespace mallowspo
