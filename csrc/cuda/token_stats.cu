// token_stats on CUDA: one block a row, each thread an online softmax over its share, merged by warp shuffles.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdio>

#include "../core/token_stats.h"
#include "../rows.h"
#include "launch.h"

namespace mallowspo::cuda {
namespace {

constexpr int threads = 256, warps = threads / 32;

template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <class T>
using acc_t = typename Accumulator<T>::type;

__device__ float widen(float x) { return x; }
__device__ double widen(double x) { return x; }
__device__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ float widen(__half x) { return __half2float(x); }
__device__ void narrow(float x, float* out) { *out = x; }
__device__ void narrow(double x, double* out) { *out = x; }
__device__ void narrow(float x, __nv_bfloat16* out) { *out = __float2bfloat16_rn(x); }
__device__ void narrow(float x, __half* out) { *out = __float2half_rn(x); }

__device__ float lowest(float) { return -3.402823466e38f; }
__device__ double lowest(double) { return -1.7976931348623157e308; }

// l - m, kept finite so that a logit of -inf contributes 0 * finite = 0; NaN stays NaN.
template <class A>
__device__ A shifted(A l, A m) {
  const A d = l - m, floor = sizeof(A) == 4 ? A(-200) : A(-1500);
  return d < floor ? floor : d;
}

template <class A>
struct Running {
  A m;
  Partial<A> sums;
};

template <class A>
__device__ void rebase(Running<A>& a, A m) {
  const A delta = shifted(a.m, m);
  shift(a.sums, delta, exp(delta));
  a.m = m;
}

template <class A>
__device__ Running<A> merged(Running<A> a, Running<A> b) {
  if (a.m < b.m) rebase(a, b.m);
  if (b.m < a.m) rebase(b, a.m);
  return {a.m, {a.sums.s + b.sums.s, a.sums.t + b.sums.t}};
}

template <class A>
__device__ Running<A> merged_over_warp(Running<A> a) {
  for (int lane = 16; lane > 0; lane /= 2)
    a = merged(a, Running<A>{__shfl_xor_sync(0xffffffffu, a.m, lane),
                             {__shfl_xor_sync(0xffffffffu, a.sums.s, lane), __shfl_xor_sync(0xffffffffu, a.sums.t, lane)}});
  return a;
}

// As torch's own kernels do: a label outside the vocabulary stops the process instead of reading foreign memory.
__device__ void check_label(int64_t label, int64_t vocab) {
  if (label < 0 || label >= vocab) {
    printf("mallowspo: label %lld is outside the vocabulary of %lld entries\n", static_cast<long long>(label),
           static_cast<long long>(vocab));
    __trap();
  }
}

template <class T>
__global__ void forward(TokenStatsArgs args) {
  using A = acc_t<T>;
  __shared__ Running<A> per_warp[warps];
  const A inverse_temperature = static_cast<A>(args.inverse_temperature);
  for (int64_t r = blockIdx.x; r < args.rows; r += gridDim.x) {
    const int64_t label = args.labels[r];
    const bool ignored = label == args.ignore_index;
    if (!ignored) check_label(label, args.vocab);
    const T* row = static_cast<const T*>(args.logits) + args.layout.offset(r);
    Running<A> mine{lowest(A{}), {0, 0}};
    for (int64_t v = threadIdx.x; v < (ignored ? 0 : args.vocab); v += threads) {
      const A l = widen(row[v]) * inverse_temperature;
      if (l > mine.m) rebase(mine, l);
      const A d = shifted(l, mine.m);
      accumulate(mine.sums, d, static_cast<A>(exp(d)));
    }
    mine = merged_over_warp(mine);
    if (threadIdx.x % 32 == 0) per_warp[threadIdx.x / 32] = mine;
    __syncthreads();
    if (threadIdx.x == 0) {
      Running<A> total = per_warp[0];
      for (int w = 1; w < warps; ++w) total = merged(total, per_warp[w]);
      const A log_s = log(total.sums.s);
      static_cast<A*>(args.logps)[r] = ignored ? A(0) : log_prob_of(static_cast<A>(widen(row[label]) * inverse_temperature), total.m, log_s);
      static_cast<A*>(args.entropy)[r] = ignored ? A(0) : entropy_of(log_s, total.sums);
      static_cast<A*>(args.row_max)[r] = ignored ? A(0) : total.m;
      static_cast<A*>(args.log_sum)[r] = ignored ? A(0) : log_s;
    }
    __syncthreads();  // per_warp is written again for the next row
  }
}

template <class T>
__global__ void backward(TokenStatsBackwardArgs args) {
  using A = acc_t<T>;
  const TokenStatsArgs& f = args.forward;
  const A inverse_temperature = static_cast<A>(f.inverse_temperature);
  for (int64_t r = blockIdx.x; r < f.rows; r += gridDim.x) {
    T* out = static_cast<T*>(args.grad_logits) + r * f.vocab;
    const int64_t label = f.labels[r];
    const bool ignored = label == f.ignore_index;
    if (!ignored) check_label(label, f.vocab);
    const T* row = static_cast<const T*>(f.logits) + f.layout.offset(r);
    const A g_logp = args.grad_logps && !ignored ? static_cast<const A*>(args.grad_logps)[r] : A(0);
    const A g_entropy = args.grad_entropy && !ignored ? static_cast<const A*>(args.grad_entropy)[r] : A(0);
    const A entropy = static_cast<const A*>(f.entropy)[r];
    const A m = static_cast<const A*>(f.row_max)[r], log_s = static_cast<const A*>(f.log_sum)[r];
    for (int64_t v = threadIdx.x; v < f.vocab; v += threads) {
      A gradient = 0;
      if (!ignored) {
        const A log_p = shifted(static_cast<A>(widen(row[v]) * inverse_temperature), m) - log_s;
        gradient = logit_gradient(log_p, static_cast<A>(exp(log_p)), g_logp, g_entropy, entropy);
        gradient = (gradient + (v == label ? g_logp : A(0))) * inverse_temperature;
      }
      narrow(gradient, out + v);
    }
  }
}

template <class Args>
void launch(const Args& args, DType dtype, int64_t rows, void (*f32)(Args), void (*f64)(Args), void (*bf16)(Args),
            void (*f16)(Args)) {
  void (*const kernels[])(Args) = {f32, f64, bf16, f16};  // in the order of DType
  kernels[static_cast<int>(dtype)]<<<blocks_for(rows), threads, 0, current_stream()>>>(args);
  check_launch();
}

}  // namespace

void token_stats(const TokenStatsArgs& args) {
  launch(args, args.dtype, args.rows, forward<float>, forward<double>, forward<__nv_bfloat16>, forward<__half>);
}

void token_stats_backward(const TokenStatsBackwardArgs& args) {
  launch(args, args.forward.dtype, args.forward.rows, backward<float>, backward<double>, backward<__nv_bfloat16>,
         backward<__half>);
}

}  // namespace mallowspo::cuda
