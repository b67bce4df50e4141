// What every core header needs: the function qualifier shared by host and device.
#pragma once

#include <cmath>
#include <cstdint>

// Internal linkage on purpose: the CPU kernels compile these headers once per instruction set, and the linker must
// never merge an AVX-512 copy into the baseline one.
#if defined(__CUDACC__)
#define MALLOWSPO_FN __host__ __device__ static inline
#else
#define MALLOWSPO_FN [[maybe_unused]] static inline
#endif
