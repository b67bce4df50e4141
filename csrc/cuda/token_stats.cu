// token_stats on CUDA: one block a row, each thread an online softmax over its share, merged by warp shuffles.
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

// Rounded here: fused with a later subtraction of the maximum it would be another number than the one compared.
__device__ float product(float x, float y) { return __fmul_rn(x, y); }
__device__ double product(double x, double y) { return __dmul_rn(x, y); }

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
__device__ acc_t<T> logit_at(const TokenStatsArgs& args, int64_t r, int64_t v) {
  const T* row = static_cast<const T*>(args.logits) + args.layout.offset(r);
  return product(widen(row[v]), static_cast<acc_t<T>>(args.inverse_temperature));
}

// The block's row summed up; thread 0 has the result. Every thread of the block calls it.
template <class T>
__device__ Running<acc_t<T>> row_sums(const TokenStatsArgs& args, int64_t r) {
  using A = acc_t<T>;
  __shared__ Running<A> per_warp[warps];
  Running<A> mine{lowest(A{}), {0, 0}};
  for (int64_t v = threadIdx.x; v < args.vocab; v += threads) {
    const A l = logit_at<T>(args, r, v);
    if (l > mine.m) rebase(mine, l);
    const A d = shifted(l, mine.m);
    accumulate(mine.sums, d, static_cast<A>(exp(d)));
  }
  mine = merged_over_warp(mine);
  __syncthreads();  // the row before may still be read
  if (threadIdx.x % 32 == 0) per_warp[threadIdx.x / 32] = mine;
  __syncthreads();
  Running<A> total = per_warp[0];
  if (threadIdx.x == 0)
    for (int w = 1; w < warps; ++w) total = merged(total, per_warp[w]);
  return total;
}

template <class T>
__global__ void forward(TokenStatsArgs args) {
  using A = acc_t<T>;
  A *logps = static_cast<A*>(args.logps), *entropy = static_cast<A*>(args.entropy);
  A *row_max = static_cast<A*>(args.row_max), *log_sum = static_cast<A*>(args.log_sum);
  for (int64_t r = blockIdx.x; r < args.rows; r += gridDim.x) {
    const int64_t label = args.labels[r];
    if (label == args.ignore_index) {
      if (threadIdx.x == 0) logps[r] = entropy[r] = row_max[r] = log_sum[r] = 0;
      continue;
    }
    check_label(label, args.entries);
    const Running<A> total = row_sums<T>(args, r);
    if (threadIdx.x == 0) {
      const A log_s = log(total.sums.s);
      logps[r] = log_prob_of(logit_at<T>(args, r, label), total.m, log_s);
      entropy[r] = entropy_of(log_s, total.sums);
      row_max[r] = total.m;
      log_sum[r] = log_s;
    }
  }
}

template <class T>
__global__ void tile(TokenStatsTileArgs args) {
  using A = acc_t<T>;
  const TokenStatsArgs& t = args.tile;
  A *row_max = static_cast<A*>(args.row_max), *sum = static_cast<A*>(args.sum);
  A *weighted = static_cast<A*>(args.weighted), *label_logit = static_cast<A*>(args.label_logit);
  for (int64_t r = blockIdx.x; r < t.rows; r += gridDim.x) {
    if (t.labels[r] == t.ignore_index) {
      if (threadIdx.x == 0) row_max[r] = sum[r] = weighted[r] = label_logit[r] = 0;
      continue;
    }
    check_label(t.labels[r], t.entries);
    const int64_t label = t.labels[r] - t.first_entry;
    const Running<A> here = row_sums<T>(t, r);
    if (threadIdx.x == 0) {
      const Running<A> total = merged(Running<A>{row_max[r], {sum[r], weighted[r]}}, here);
      const A logit = label >= 0 && label < t.vocab ? logit_at<T>(t, r, label) : label_logit[r];
      const A log_s = log(total.sums.s);
      row_max[r] = total.m;
      sum[r] = args.last() ? log_s : total.sums.s;
      weighted[r] = args.last() ? entropy_of(log_s, total.sums) : total.sums.t;
      label_logit[r] = args.last() ? log_prob_of(logit, total.m, log_s) : logit;
    }
  }
}

template <class T>
__global__ void backward(TokenStatsBackwardArgs args) {
  using A = acc_t<T>;
  const TokenStatsArgs& f = args.forward;
  const A inverse_temperature = static_cast<A>(f.inverse_temperature);
  for (int64_t r = blockIdx.x; r < f.rows; r += gridDim.x) {
    T* out = static_cast<T*>(args.grad_logits) + args.grad_layout.offset(r);
    const bool ignored = f.labels[r] == f.ignore_index;
    if (!ignored) check_label(f.labels[r], f.entries);
    const int64_t label = f.labels[r] - f.first_entry;
    const A g_logp = args.grad_logps && !ignored ? static_cast<const A*>(args.grad_logps)[r] : A(0);
    const A g_entropy = args.grad_entropy && !ignored ? static_cast<const A*>(args.grad_entropy)[r] : A(0);
    const A entropy = static_cast<const A*>(f.entropy)[r];
    const A m = static_cast<const A*>(f.row_max)[r], log_s = static_cast<const A*>(f.log_sum)[r];
    for (int64_t v = threadIdx.x; v < f.vocab; v += threads) {
      A gradient = 0;
      if (!ignored) {
        const A log_p = shifted(logit_at<T>(f, r, v), m) - log_s;
        gradient = logit_gradient(log_p, static_cast<A>(exp(log_p)), g_logp, g_entropy, entropy);
        gradient = (gradient + (v == label ? g_logp : A(0))) * inverse_temperature;
      }
      narrow(gradient, out + v);
    }
  }
}

template <class Args>
void launch_rows(const Args& args, DType dtype, int64_t rows, void (*f32)(Args), void (*f64)(Args),
                 void (*bf16)(Args), void (*f16)(Args)) {
  void (*const kernels[])(Args) = {f32, f64, bf16, f16};  // in the order of DType
  launch(kernels[static_cast<int>(dtype)], rows, threads, args);
}

}  // namespace

void token_stats(const TokenStatsArgs& args) {
  launch_rows(args, args.dtype, args.rows, forward<float>, forward<double>, forward<__nv_bfloat16>, forward<__half>);
}

void token_stats_tile(const TokenStatsTileArgs& args) {
  launch_rows(args, args.tile.dtype, args.tile.rows, tile<float>, tile<double>, tile<__nv_bfloat16>, tile<__half>);
}

void token_stats_backward(const TokenStatsBackwardArgs& args) {
  launch_rows(args, args.forward.dtype, args.forward.rows, backward<float>, backward<double>, backward<__nv_bfloat16>,
         backward<__half>);
}

}  // namespace mallowspo::cuda
