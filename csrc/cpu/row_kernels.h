// The row kernels exist once per instruction set; token_stats.cpp picks one at run time.
#pragma once

#include "../rows.h"

namespace mallowspo::cpu {

#define MALLOWSPO_DECLARE_ROW_KERNELS(ISA)                                               \
  namespace ISA {                                                                        \
  void token_stats_rows(const TokenStatsArgs&, int64_t begin, int64_t end);              \
  void token_stats_tile_rows(const TokenStatsTileArgs&, int64_t begin, int64_t end);     \
  void token_stats_backward_rows(const TokenStatsBackwardArgs&, int64_t begin, int64_t end); \
  }
MALLOWSPO_DECLARE_ROW_KERNELS(baseline)
MALLOWSPO_DECLARE_ROW_KERNELS(avx2)
MALLOWSPO_DECLARE_ROW_KERNELS(avx512)
#undef MALLOWSPO_DECLARE_ROW_KERNELS

}  // namespace mallowspo::cpu
