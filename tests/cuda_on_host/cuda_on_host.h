// Enough of CUDA to run the kernels of csrc/cuda on host threads, for tests alone: a block is as many std::threads, the
// blocks run one after another, __syncthreads and the warp shuffles are barriers. It shows what a kernel computes, its
// indexing, and missing barriers (under ThreadSanitizer). It says nothing about speed, occupancy or the memory model of a
// device, and a warp's threads run in no particular order.
#pragma once

#include <barrier>
#include <math.h>  // the overloads for float in the global namespace, as CUDA has them
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __host__
#define __device__
#define __global__ static
#define __shared__ static  // one block at a time, so a static is its threads' own

struct Index {
  unsigned x;
};
inline thread_local Index threadIdx, blockIdx, gridDim;

struct Block {
  explicit Block(int threads) : all(threads), words(threads) {
    for (int first = 0; first < threads; first += 32) warps.push_back(std::make_unique<std::barrier<>>(std::min(32, threads - first)));
  }
  std::barrier<> all;
  std::vector<std::unique_ptr<std::barrier<>>> warps;
  std::vector<uint64_t> words;  // what each thread offers to a shuffle
};
inline Block* current_block = nullptr;

inline void __syncthreads() { current_block->all.arrive_and_wait(); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  if (mask != 0xffffffffu) std::abort();  // only whole warps shuffle here
  std::barrier<>& warp = *current_block->warps[threadIdx.x / 32];
  std::memcpy(&current_block->words[threadIdx.x], &value, sizeof value);
  warp.arrive_and_wait();
  std::memcpy(&value, &current_block->words[threadIdx.x ^ lane_mask], sizeof value);
  warp.arrive_and_wait();  // the next shuffle overwrites the words
  return value;
}

[[noreturn]] inline void __trap() { std::abort(); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dmul_rn(double a, double b) { return a * b; }

struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}
inline __nv_bfloat16 __float2bfloat16_rn(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof bits);
  if (f != f) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
using __half = _Float16;
inline float __half2float(__half x) { return static_cast<float>(x); }
inline __half __float2half_rn(float x) { return static_cast<__half>(x); }

namespace mallowspo::cuda {

// A few blocks only, so that the kernels walk over what is left, as they do on a device with many rows.
template <class... Args>
void launch(void (*kernel)(Args...), int64_t blocks, int threads, Args... args) {
  const unsigned grid = static_cast<unsigned>(blocks < 3 ? blocks : 3);
  for (unsigned b = 0; b < grid; ++b) {
    Block block(threads);
    current_block = &block;
    std::vector<std::thread> running;
    for (int t = 0; t < threads; ++t)
      running.emplace_back([&, t] {
        threadIdx = {static_cast<unsigned>(t)};
        blockIdx = {b};
        gridDim = {grid};
        kernel(args...);
      });
    for (std::thread& thread : running) thread.join();
  }
}

}  // namespace mallowspo::cuda
