// What every core header needs: the function qualifiers shared by host and device.
#pragma once

#include <cmath>
#include <cstdint>

// Internal linkage on purpose: the CPU kernels compile these headers once per instruction set, and the linker must
// never merge an AVX-512 copy into the baseline one.
#if defined(__CUDACC__)
#define MALLOWSPO_HOST_DEVICE __host__ __device__
#else
#define MALLOWSPO_HOST_DEVICE
#endif
#define MALLOWSPO_FN [[maybe_unused]] MALLOWSPO_HOST_DEVICE static inline
