// What every .cu file needs of CUDA: its headers, two instructions without a name in C++, and launches on the current
// stream, checked.
#pragma once

#if defined(MALLOWSPO_CUDA_ON_HOST)
#include "cuda_on_host.h"  // the tests run the kernels without a GPU
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/headeronly/util/Exception.h>

#include "stream.h"

namespace mallowspo::cuda {

// 2^x to 2 ulp; 0 where the result is below the smallest normal number. CUDA's own expf ends in this instruction too.
__device__ inline float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The larger one, or NaN where one is NaN; fmaxf would return the other.
__device__ inline float larger_or_nan(float x, float y) {
  float z;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
}

// The current stream of the current device, which the caller's device guard has set.
inline cudaStream_t current_stream() {
  int device = 0;
  STD_TORCH_CHECK(cudaGetDevice(&device) == cudaSuccess, "no current CUDA device");
  static const CurrentStream current = find_current_stream();
  STD_TORCH_CHECK(current != nullptr, "this torch was built without CUDA");
  void* stream = nullptr;
  STD_TORCH_CHECK(current(device, &stream) == AOTI_TORCH_SUCCESS, "torch has no current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch() {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "CUDA kernel launch failed: ", cudaGetErrorString(error));
}

// The only place that launches: at most 65536 blocks along x, over whose number the kernels walk, and `parts` along y.
template <class... Args>
void launch(void (*kernel)(Args...), int64_t blocks, int parts, int threads, Args... args) {
  const dim3 grid(static_cast<unsigned>(blocks < 65536 ? blocks : 65536), static_cast<unsigned>(parts));
  kernel<<<grid, threads, 0, current_stream()>>>(args...);
  check_launch();
}

}  // namespace mallowspo::cuda

#endif  // MALLOWSPO_CUDA_ON_HOST
