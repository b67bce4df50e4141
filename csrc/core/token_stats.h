// Log-probability of a label and entropy of a row of logits, in one pass over the row.
//
// With m the largest logit (after the temperature), s = sum_v e^(l_v - m) and t = sum_v (l_v - m) e^(l_v - m):
//   log p_y = (l_y - m) - log s,   H = log s - t / s,   and both are sums of terms of one sign, so nothing cancels.
// Two partial results over disjoint parts of a row merge by moving them to the same m, in any order.
//
// Every function is a template so that the same text serves a scalar, a SIMD vector and a CUDA thread.
#pragma once

#include "defs.h"

namespace mallowspo {

// The type of sums and results over logits of type T.
template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <class T>
using acc_t = typename Accumulator<T>::type;

template <class T>
struct Partial {
  T s, t;
};

// d = l - m <= 0 and e = exp(d); the caller clamps d so that d * e is 0, not NaN, for a logit of -inf.
template <class T>
MALLOWSPO_FN void accumulate(Partial<T>& p, T d, T e) {
  p.s += e;
  p.t += d * e;
}

// Moves a partial from its maximum to a larger one; delta = old - new <= 0 and scale = exp(delta).
template <class T>
MALLOWSPO_FN void shift(Partial<T>& p, T delta, T scale) {
  p.t = scale * (p.t + delta * p.s);
  p.s = scale * p.s;
}

template <class T>
MALLOWSPO_FN T entropy_of(T log_s, Partial<T> p) {
  return log_s - p.t / p.s;
}

template <class T>
MALLOWSPO_FN T log_prob_of(T logit, T m, T log_s) {
  return (logit - m) - log_s;
}

// d(g_logp log p_y + g_entropy H) / d l_v without the label's own +g_logp:  -p_v (g_logp + g_entropy (log p_v + H)).
template <class V, class T>
MALLOWSPO_FN V logit_gradient(V log_p, V p, T g_logp, T g_entropy, T entropy) {
  return -p * (g_logp + g_entropy * (log_p + entropy));
}

}  // namespace mallowspo
