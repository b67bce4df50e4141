// Torch's current CUDA stream.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

namespace mallowspo::cuda {

using CurrentStream = AOTITorchError (*)(int32_t device_index, void** stream);

// Torch's function, or null where torch has no CUDA. Asked for by name: a reference would keep one build from loading
// where torch has none, and a weak reference finds nothing, since Python loads torch's libraries for itself alone.
inline CurrentStream find_current_stream() {
  void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  return torch_cuda ? reinterpret_cast<CurrentStream>(dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream"))
                    : nullptr;
}

}  // namespace mallowspo::cuda
