// A row of logits in the hands of a block: its 16-byte vectors, and the running sums of its logits.
#pragma once

#include "../core/token_stats.h"
#include "../rows.h"
#include "launch.h"

namespace mallowspo::cuda {

constexpr int threads = 256, warps = threads / 32;
constexpr int group = 4;  // 16-byte loads that a thread has in flight
constexpr unsigned whole_warp = 0xffffffffu;

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline void narrow(float x, float* out) { *out = x; }
__device__ inline void narrow(double x, double* out) { *out = x; }
__device__ inline void narrow(float x, __nv_bfloat16* out) { *out = __float2bfloat16_rn(x); }
__device__ inline void narrow(float x, __half* out) { *out = __float2half_rn(x); }

// Rounded here: fused with a later subtraction of the maximum it would be another number than the one compared.
__device__ inline float product(float x, float y) { return __fmul_rn(x, y); }
__device__ inline double product(double x, double y) { return __dmul_rn(x, y); }

__device__ inline float lowest(float) { return -3.402823466e38f; }
__device__ inline double lowest(double) { return -1.7976931348623157e308; }

// l - m, kept finite so that a logit of -inf contributes 0 * finite = 0; NaN stays NaN.
__device__ inline float shifted(float l, float m) { return larger_or_nan(l - m, -200.0f); }
__device__ inline double shifted(double l, double m) { return l - m < -1500 ? -1500 : l - m; }

// e^d for d <= 0, at half of expf's cost, which would not fit into the time that the logits take to arrive. The
// rounding of d log2(e) alone would cost |d| / 2 ulp; it is known exactly and comes back as the factor 1 + rest. What
// is left adds to the 2 ulp of exp2_approximate one ulp for d > -20, two for d > -43, three at most.
__device__ inline float exp_of(float d) {
  const float power = product(d, 1.442695041f), e = exp2_approximate(power);
  const float rest = fmaf(power, -0.6931471806f, d);
  return fmaf(e, rest, e);
}
__device__ inline double exp_of(double d) { return exp(d); }

// The part of a row that this block reads or writes, one of gridDim.y parts: vectors [begin, end) of those from the
// aligned element `head` on. The elements in front of them and behind, fewer than two vectors, are the first block's.
template <class T>
struct RowPart {
  static constexpr int lanes = 16 / sizeof(T);
  int64_t head, begin, end;
  int64_t loose;   // this thread's element outside of the vectors, or none: vocab or more
  bool any_loose;  // has any thread one

  __device__ RowPart(const T* row, int64_t vocab) {
    const int before = static_cast<int>(-reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T));
    head = before < vocab ? before : vocab;
    const int64_t vectors = (vocab - head) / lanes, tail = head + vectors * lanes;
    const int64_t steps = gridDim.y == 1 ? 0 : (vectors + threads * gridDim.y - 1) / (threads * gridDim.y);
    const int64_t share = gridDim.y == 1 ? vectors : steps * threads;  // whole steps of the block
    begin = blockIdx.y * share < vectors ? blockIdx.y * share : vectors;
    end = begin + share < vectors ? begin + share : vectors;
    any_loose = blockIdx.y == 0 && (head > 0 || tail < vocab);
    loose = blockIdx.y != 0 ? vocab : threadIdx.x < head ? threadIdx.x : threadIdx.x - head + tail;
  }
};

template <class A>
struct Running {
  A m;
  Partial<A> sums;
};

template <class A>
__device__ Running<A> nothing() {
  return {lowest(A{}), {0, 0}};
}

template <class A>
__device__ void rebase(Running<A>& a, A m) {
  const A delta = shifted(a.m, m);
  shift(a.sums, delta, exp_of(delta));
  a.m = m;
}

template <class A>
__device__ Running<A> merged(Running<A> a, Running<A> b) {
  if (a.m < b.m) rebase(a, b.m);
  if (b.m < a.m) rebase(b, a.m);
  return {a.m, {a.sums.s + b.sums.s, a.sums.t + b.sums.t}};
}

// The same for every lane, and in the same order every time.
template <class A>
__device__ Running<A> merged_over_warp(Running<A> a) {
  for (int lane = 16; lane > 0; lane /= 2) {
    const A m = __shfl_xor_sync(whole_warp, a.m, lane);
    const A s = __shfl_xor_sync(whole_warp, a.sums.s, lane), t = __shfl_xor_sync(whole_warp, a.sums.t, lane);
    a = merged(a, Running<A>{m, {s, t}});
  }
  return a;
}

template <int count, class A>
__device__ void scale(A (&l)[count], A inverse_temperature) {
  if (inverse_temperature != 1)
    for (A& x : l) x = product(x, inverse_temperature);
}

// Adds `count` logits of every lane. The warp shares one maximum: it then grows a few times a row, not for some lane at
// almost every step. The logits are summed up among themselves first, which keeps the rounding errors small.
template <int count, class A>
__device__ void add(Running<A>& warp, const A (&l)[count]) {
  A top = warp.m;
  for (const A x : l) top = fmax(top, x);
  if (__any_sync(whole_warp, top > warp.m)) {
    for (int lane = 16; lane > 0; lane /= 2) top = fmax(top, __shfl_xor_sync(whole_warp, top, lane));
    rebase(warp, top);
  }
  Partial<A> sums{0, 0};
  for (const A x : l) {
    const A d = shifted(x, warp.m);
    accumulate(sums, d, exp_of(d));
  }
  warp.sums.s += sums.s;
  warp.sums.t += sums.t;
}

template <class T>
__device__ void unpack(T logit, acc_t<T>* out) {
  *out = widen(logit);
}
template <class T>
__device__ void unpack(uint4 vector, acc_t<T>* out) {
  T x[16 / sizeof(T)];
  memcpy(x, &vector, 16);
  for (T logit : x) *out++ = widen(logit);
}
template <>
__device__ inline void unpack<__nv_bfloat16>(uint4 vector, float* out) {  // one instruction each, by halves two
  for (unsigned pair : {vector.x, vector.y, vector.z, vector.w}) {
    *out++ = __uint_as_float(pair << 16);
    *out++ = __uint_as_float(pair & 0xffff0000u);
  }
}

// This block's part of the row summed up; the first warp has the result. Every thread of the block calls it.
template <class T>
__device__ Running<acc_t<T>> row_sums(const T* row, int64_t vocab, acc_t<T> inverse_temperature) {
  using A = acc_t<T>;
  constexpr int lanes = RowPart<T>::lanes;
  constexpr A none = -static_cast<A>(INFINITY);  // adds nothing
  const RowPart<T> part(row, vocab);
  const uint4* vectors = reinterpret_cast<const uint4*>(row + part.head);
  Running<A> mine = nothing<A>();
  int64_t first = part.begin;  // the same in all threads, as every warp adds as a whole
  for (; first + group * threads <= part.end; first += group * threads) {
    uint4 loaded[group];
    for (int u = 0; u < group; ++u) loaded[u] = vectors[first + u * threads + threadIdx.x];
    A l[group * lanes];
    for (int u = 0; u < group; ++u) unpack<T>(loaded[u], l + u * lanes);
    scale(l, inverse_temperature);
    add(mine, l);
  }
  for (; first < part.end; first += threads) {
    A l[lanes];
    for (A& x : l) x = none;
    if (first + threadIdx.x < part.end) {
      unpack<T>(vectors[first + threadIdx.x], l);
      scale(l, inverse_temperature);
    }
    add(mine, l);
  }
  if (part.any_loose) {
    A l[1] = {part.loose < vocab ? product(widen(row[part.loose]), inverse_temperature) : none};
    add(mine, l);
  }

  __shared__ Running<A> per_warp[warps];
  for (int lane = 16; lane > 0; lane /= 2) {
    mine.sums.s += __shfl_xor_sync(whole_warp, mine.sums.s, lane);
    mine.sums.t += __shfl_xor_sync(whole_warp, mine.sums.t, lane);
  }
  __syncthreads();  // the row before may still be read
  if (threadIdx.x % 32 == 0) per_warp[threadIdx.x / 32] = mine;
  __syncthreads();
  if (threadIdx.x >= 32) return mine;
  return merged_over_warp(threadIdx.x < warps ? per_warp[threadIdx.x] : nothing<A>());
}

}  // namespace mallowspo::cuda
