// token_stats on the CPU: picks the widest instruction set the machine has, checks the labels, splits rows over threads.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "row_kernels.h"

namespace mallowspo::cpu {
namespace {

struct RowKernels {
  void (*forward)(const TokenStatsArgs&, int64_t, int64_t);
  void (*tile)(const TokenStatsTileArgs&, int64_t, int64_t);
  void (*backward)(const TokenStatsBackwardArgs&, int64_t, int64_t);
};

// The widest instruction set that the machine has and ATEN_CPU_CAPABILITY (default, avx2, avx512) allows, as in torch.
RowKernels pick() {
#if defined(MALLOWSPO_X86)
  const char* set = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string most = set ? set : "avx512";
  __builtin_cpu_init();
  if (most == "avx512" && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return {avx512::token_stats_rows, avx512::token_stats_tile_rows, avx512::token_stats_backward_rows};
  if (most != "default" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c"))
    return {avx2::token_stats_rows, avx2::token_stats_tile_rows, avx2::token_stats_backward_rows};
#endif
  return {baseline::token_stats_rows, baseline::token_stats_tile_rows, baseline::token_stats_backward_rows};
}

const RowKernels& kernels() {
  static const RowKernels picked = pick();
  return picked;
}

// About this many logits make a thread worth waking.
int64_t grain(int64_t vocab) { return std::max<int64_t>(1, 32768 / vocab); }

// Before the parallel region, because an exception may not leave it.
void check_labels(const TokenStatsArgs& args) {
  for (int64_t r = 0; r < args.rows; ++r) {
    const int64_t label = args.labels[r];
    if (label != args.ignore_index && (label < 0 || label >= args.entries))
      throw std::out_of_range("label " + std::to_string(label) + " is outside the vocabulary of " +
                              std::to_string(args.entries) + " entries; use ignore_index (" + std::to_string(args.ignore_index) +
                              ") for rows without a label");
  }
}

}  // namespace

void token_stats(const TokenStatsArgs& args) {
  check_labels(args);
  torch::stable::parallel_for(0, args.rows, grain(args.vocab),
                              [&](int64_t begin, int64_t end) { kernels().forward(args, begin, end); });
}

void token_stats_tile(const TokenStatsTileArgs& args) {
  check_labels(args.tile);
  torch::stable::parallel_for(0, args.tile.rows, grain(args.tile.vocab),
                              [&](int64_t begin, int64_t end) { kernels().tile(args, begin, end); });
}

void token_stats_backward(const TokenStatsBackwardArgs& args) {
  check_labels(args.forward);
  torch::stable::parallel_for(0, args.forward.rows, grain(args.forward.vocab),
                              [&](int64_t begin, int64_t end) { kernels().backward(args, begin, end); });
}

}  // namespace mallowspo::cpu
