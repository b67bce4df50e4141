// What an operator hands to a backend: plain pointers, sizes and strides, the same for CPU and CUDA.
#pragma once

#include "core/defs.h"
#include "core/preference.h"

namespace mallowspo {

enum class DType : int32_t { f32, f64, bf16, f16 };

// Rows of a tensor [..., V] whose leading dimensions may have any strides; strides count elements.
struct RowLayout {
  static constexpr int max_dims = 8;
  int dims;
  int64_t sizes[max_dims], strides[max_dims];

  template <class Int>
#if defined(__CUDACC__)
  __host__ __device__
#endif
      Int offset(Int row) const {
    Int at = 0;
    for (int d = dims - 1; d > 0; --d) {
      at += row % sizes[d] * strides[d];
      row /= sizes[d];
    }
    return at + row * strides[0];
  }
};

struct TokenStatsArgs {
  DType dtype;
  int64_t rows, vocab, ignore_index;
  // The logits may be a tile of the vocabulary: entries first_entry, first_entry + 1, ... of `entries` in all. A label
  // outside the tile belongs to another one.
  int64_t first_entry, entries;
  double inverse_temperature;
  RowLayout layout;       // of logits
  const void* logits;     // last dimension contiguous
  const int64_t* labels;  // [rows], contiguous
  // [rows], float32 (float64 for float64 logits). The maximum and the log of the sum are kept apart: their sum, the
  // log-sum-exp, would lose digits where the logits carry a large offset.
  void *logps, *entropy, *row_max, *log_sum;
  void* scratch;  // token_stats_scratch() numbers of the outputs' dtype, on CUDA
};

// What the tiles of a row have given so far (core/token_stats.h): m, s, t and the label's logit; all [rows]. The last
// tile turns s, t and the logit into log s, the entropy and the log-probability. With `numerators` the logits are
// overwritten with -e^(l - m) / temperature, 0 for the label.
struct TokenStatsTileArgs {
  TokenStatsArgs tile;
  bool numerators;
  void *row_max, *sum, *weighted, *label_logit;

#if defined(__CUDACC__)
  __host__ __device__
#endif
      bool last() const {
    return tile.first_entry + tile.vocab == tile.entries;
  }
};

struct TokenStatsBackwardArgs {
  TokenStatsArgs forward;                 // its outputs are inputs here
  const void *grad_logps, *grad_entropy;  // [rows] or null
  void* grad_logits;                      // [rows, vocab] with grad_layout; may be the logits themselves
  RowLayout grad_layout;
};

struct PairArgs {
  DType dtype;  // f32 or f64, of every tensor here
  int64_t pairs;
  Objective objective;
  const void *chosen, *rejected, *ref_chosen, *ref_rejected, *dispersion;  // [pairs]; the last three may be null
  void *losses, *chosen_rewards, *rejected_rewards;                       // [pairs]
  void* slopes;  // [3, pairs]: the losses' derivatives in the two log-ratios and in the dispersion
};

struct MallowsArgs {
  DType dtype;
  int64_t count;
  double smoothing;
  const void *margin, *dispersion;
  void* log_probs;  // [count]
  void* slopes;     // [2, count]: their derivatives in margin and dispersion
};

#define MALLOWSPO_DECLARE_BACKEND(NAME)                        \
  namespace NAME {                                             \
  void token_stats(const TokenStatsArgs&);                     \
  void token_stats_tile(const TokenStatsTileArgs&);            \
  void token_stats_backward(const TokenStatsBackwardArgs&);    \
  void preference_loss(const PairArgs&);                       \
  void mallows_log_prob(const MallowsArgs&);                   \
  }
MALLOWSPO_DECLARE_BACKEND(cpu)
MALLOWSPO_DECLARE_BACKEND(cuda)
namespace cuda {
int64_t token_stats_scratch(const TokenStatsArgs&);  // of token_stats and token_stats_tile
}
#undef MALLOWSPO_DECLARE_BACKEND

}  // namespace mallowspo
