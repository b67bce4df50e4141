// Enough of CUDA to run the kernels of csrc/cuda on host threads, for tests alone: a block is as many std::threads, the
// blocks and kernels run one after another, __syncthreads, warp shuffles and votes are barriers. It shows what a kernel
// computes, its indexing and alignment, and missing barriers (under ThreadSanitizer). It says nothing about speed,
// occupancy, the memory model of a device or the order of launches on a stream, a warp's threads run in no particular
// order, and exp2_approximate is exact here.
#pragma once

#include <algorithm>
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
#define __launch_bounds__(...)
#define __shared__ static  // one block at a time, so a static is its threads' own

struct Index {
  unsigned x, y;
};
inline thread_local Index threadIdx, blockIdx, gridDim;
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

struct Block {
  explicit Block(int threads) : all(threads), words(2 * threads) {
    for (int first = 0; first < threads; first += 32)
      warps.push_back(std::make_unique<std::barrier<>>(std::min(32, threads - first)));
  }
  std::barrier<> all;
  std::vector<std::unique_ptr<std::barrier<>>> warps;
  std::vector<uint64_t> words;  // what each thread offers to its warp: one half is read while the other is written
};
inline Block* current_block = nullptr;
inline thread_local int exchanges;

inline void __syncthreads() { current_block->all.arrive_and_wait(); }

// What the 32 threads of the warp offer.
inline const uint64_t* exchanged(unsigned mask, uint64_t word) {
  if (mask != 0xffffffffu) std::abort();  // only whole warps meet here
  uint64_t* half = current_block->words.data() + (exchanges++ % 2 ? current_block->words.size() / 2 : 0);
  half[threadIdx.x] = word;
  current_block->warps[threadIdx.x / 32]->arrive_and_wait();
  return half + threadIdx.x / 32 * 32;
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof value);
  word = exchanged(mask, word)[(threadIdx.x % 32) ^ lane_mask];
  std::memcpy(&value, &word, sizeof value);
  return value;
}

inline bool __any_sync(unsigned mask, bool value) {
  const uint64_t* words = exchanged(mask, value);
  return std::any_of(words, words + 32, [](uint64_t word) { return word != 0; });
}

[[noreturn]] inline void __trap() { std::abort(); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float __uint_as_float(unsigned bits) {
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof bits);
  if (f != f) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
using __half = _Float16;
inline float __half2float(__half x) { return static_cast<float>(x); }
inline __half __float2half_rn(float x) { return static_cast<__half>(x); }
using std::fmax, std::memcpy;

namespace mallowspo::cuda {

inline float exp2_approximate(float x) { return x < -126 ? 0 : exp2f(x); }
inline float larger_or_nan(float x, float y) { return x != x || x > y ? x : y; }

// A few blocks only, so that the kernels walk over what is left, as they do on a device with many rows. The threads
// serve all blocks, one after another; they end with the launch, which orders it before the next.
template <class... Args>
void launch(void (*kernel)(Args...), int64_t blocks, int parts, int threads, Args... args) {
  const Index grid{static_cast<unsigned>(blocks < 3 ? blocks : 3), static_cast<unsigned>(parts)};
  Block block(threads);
  current_block = &block;
  std::vector<std::thread> running;
  for (int t = 0; t < threads; ++t)
    running.emplace_back([&, t] {
      exchanges = 0;
      for (unsigned y = 0; y < grid.y; ++y)
        for (unsigned x = 0; x < grid.x; ++x) {
          threadIdx = {static_cast<unsigned>(t), 0};
          blockIdx = {x, y};
          gridDim = grid;
          kernel(args...);
          __syncthreads();  // before the next block has its shared memory
        }
    });
  for (std::thread& thread : running) thread.join();
}

}  // namespace mallowspo::cuda
