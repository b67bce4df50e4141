// Stands in for torch's header of this name: the CPU kernels beside the CUDA kernels, without libtorch, in one thread.
#pragma once
#include <cstdint>

namespace torch::stable {
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t /*grain*/, const F& f) {
  if (begin < end) f(begin, end);
}
}  // namespace torch::stable
