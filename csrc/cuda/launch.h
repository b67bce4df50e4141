// How every .cu file launches: on the current stream, checked.
#pragma once

#if defined(MALLOWSPO_CUDA_ON_HOST)
#include "cuda_on_host.h"  // the tests run the kernels without a GPU
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/Exception.h>

// Only a torch with CUDA defines it. The weak reference lets one library also load where torch has none; no CUDA tensor
// can reach a kernel there.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                  void** ret_stream);

namespace mallowspo::cuda {

// The current stream of the current device, which the caller's device guard has set.
inline cudaStream_t current_stream() {
  int device = 0;
  STD_TORCH_CHECK(cudaGetDevice(&device) == cudaSuccess, "no current CUDA device");
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch was built without CUDA");
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == AOTI_TORCH_SUCCESS,
                  "torch has no current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch() {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "CUDA kernel launch failed: ", cudaGetErrorString(error));
}

// The only place that launches: at most 65536 blocks, over whose number the kernels walk.
template <class... Args>
void launch(void (*kernel)(Args...), int64_t blocks, int threads, Args... args) {
  kernel<<<static_cast<unsigned>(blocks < 65536 ? blocks : 65536), threads, 0, current_stream()>>>(args...);
  check_launch();
}

}  // namespace mallowspo::cuda

#endif  // MALLOWSPO_CUDA_ON_HOST
