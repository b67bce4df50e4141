// token_stats on CUDA: a block sums up a row; where rows are few, a part of one, and a second kernel merges the parts.
#include <array>
#include <cstdio>

#include "row.cuh"

namespace mallowspo::cuda {
namespace {

// As torch's own kernels do: a label outside the vocabulary stops the process instead of reading foreign memory.
__device__ void check_label(int64_t label, int64_t vocab) {
  if (label < 0 || label >= vocab) {
    printf("mallowspo: label %lld is outside the vocabulary of %lld entries\n", static_cast<long long>(label),
           static_cast<long long>(vocab));
    __trap();
  }
}

template <class T>
__device__ const T* row_of(const TokenStatsArgs& args, int64_t r) {
  return static_cast<const T*>(args.logits) + args.layout.offset(r);
}

template <class T>
__device__ acc_t<T> logit_at(const TokenStatsArgs& args, int64_t r, int64_t v) {
  return product(widen(row_of<T>(args, r)[v]), static_cast<acc_t<T>>(args.inverse_temperature));
}

// ---- what becomes of a row's sums: the statistics, or a step in the state of its tiles ------------------------------

__device__ const TokenStatsArgs& rows_of(const TokenStatsArgs& args) { return args; }
__device__ const TokenStatsArgs& rows_of(const TokenStatsTileArgs& args) { return args.tile; }

template <class A>
__device__ void write_ignored(const TokenStatsArgs& args, int64_t r) {
  for (void* out : {args.logps, args.entropy, args.row_max, args.log_sum}) static_cast<A*>(out)[r] = 0;
}

template <class A>
__device__ void write_ignored(const TokenStatsTileArgs& args, int64_t r) {
  for (void* out : {args.row_max, args.sum, args.weighted, args.label_logit}) static_cast<A*>(out)[r] = 0;
}

template <class T>
__device__ void write_row(const TokenStatsArgs& args, int64_t r, const Running<acc_t<T>>& total) {
  using A = acc_t<T>;
  const A log_s = log(total.sums.s);
  static_cast<A*>(args.logps)[r] = log_prob_of(logit_at<T>(args, r, args.labels[r]), total.m, log_s);
  static_cast<A*>(args.entropy)[r] = entropy_of(log_s, total.sums);
  static_cast<A*>(args.row_max)[r] = total.m;
  static_cast<A*>(args.log_sum)[r] = log_s;
}

template <class T>
__device__ void write_row(const TokenStatsTileArgs& args, int64_t r, const Running<acc_t<T>>& here) {
  using A = acc_t<T>;
  A *row_max = static_cast<A*>(args.row_max), *sum = static_cast<A*>(args.sum);
  A *weighted = static_cast<A*>(args.weighted), *label_logit = static_cast<A*>(args.label_logit);
  const int64_t label = args.tile.labels[r] - args.tile.first_entry;
  const Running<A> total = merged(Running<A>{row_max[r], {sum[r], weighted[r]}}, here);
  const A logit = label >= 0 && label < args.tile.vocab ? logit_at<T>(args.tile, r, label) : label_logit[r];
  const A log_s = log(total.sums.s);
  row_max[r] = total.m;
  sum[r] = args.last() ? log_s : total.sums.s;
  weighted[r] = args.last() ? entropy_of(log_s, total.sums) : total.sums.t;
  label_logit[r] = args.last() ? log_prob_of(logit, total.m, log_s) : logit;
}

// Blocks that shall share a multiprocessor: while some wait for logits, the others compute. More would spill registers.
template <class T>
constexpr int resident = sizeof(T) == 8 ? 2 : 4;

// ---- forward --------------------------------------------------------------------------------------------------------

template <class T, class Args>
__global__ void __launch_bounds__(threads, resident<T>) sum_rows(Args args) {
  using A = acc_t<T>;
  const TokenStatsArgs& rows = rows_of(args);
  for (int64_t r = blockIdx.x; r < rows.rows; r += gridDim.x) {
    if (rows.labels[r] == rows.ignore_index) {
      if (blockIdx.y == 0 && threadIdx.x == 0) write_ignored<A>(args, r);
      continue;
    }
    check_label(rows.labels[r], rows.entries);
    const Running<A> sums = row_sums<T>(row_of<T>(rows, r), rows.vocab, static_cast<A>(rows.inverse_temperature));
    if (threadIdx.x != 0) continue;
    if (gridDim.y == 1)
      write_row<T>(args, r, sums);
    else
      static_cast<Running<A>*>(rows.scratch)[r * gridDim.y + blockIdx.y] = sums;
  }
}

// A warp a row; the order of the parts is always the same.
template <class T, class Args>
__global__ void merge_parts(Args args, int parts) {
  using A = acc_t<T>;
  const TokenStatsArgs& rows = rows_of(args);
  const int lane = threadIdx.x % 32;
  for (int64_t r = blockIdx.x * warps + threadIdx.x / 32; r < rows.rows; r += gridDim.x * warps) {
    if (rows.labels[r] == rows.ignore_index) continue;
    Running<A> total = nothing<A>();
    for (int p = lane; p < parts; p += 32)
      total = merged(total, static_cast<const Running<A>*>(rows.scratch)[r * parts + p]);
    total = merged_over_warp(total);
    if (lane == 0) write_row<T>(args, r, total);
  }
}

// ---- backward -------------------------------------------------------------------------------------------------------

template <class A>
struct RowGradient {
  int64_t label;  // in the row; outside of it where it belongs to another tile
  A inverse_temperature, m, log_s, entropy, g_logp, g_entropy;
  bool numerators;  // the label's own entry is 0

  __device__ A operator()(A logit) const {
    const A log_p = shifted(product(logit, inverse_temperature), m) - log_s;
    return logit_gradient(log_p, exp_of(log_p), g_logp, g_entropy, entropy);
  }

  // From unit `at` on, every step-th before `end`; a unit is one or more elements T, the first unit starts at `first`.
  // Several are loaded before one is stored: out may be in, so the compiler would not move a load up.
  template <class T, class Unit>
  __device__ void write(const Unit* in, Unit* out, int64_t first, int64_t at, int64_t end, int64_t step) const {
    constexpr int batch = sizeof(Unit) == 16 ? 2 : 8, count = sizeof(Unit) / sizeof(T);
    const int64_t label_unit = label < first ? -1 : (label - first) / count;
    const int label_place = static_cast<int>((label - first) % count);
    for (; at < end; at += batch * step) {
      Unit units[batch];
#pragma unroll
      for (int u = 0; u < batch; ++u)
        if (at + u * step < end) units[u] = in[at + u * step];
#pragma unroll
      for (int u = 0; u < batch; ++u) {
        if (at + u * step >= end) break;
        A x[count];
        unpack<T>(units[u], x);
        for (A& each : x) each = (*this)(each);
        if (at + u * step == label_unit)
#pragma unroll  // with i known, x stays in registers
          for (int i = 0; i < count; ++i)
            if (i == label_place) x[i] = numerators ? A(0) : x[i] + g_logp;
        T narrowed[count];
        for (int i = 0; i < count; ++i) narrow(x[i], narrowed + i);
        memcpy(units + u, narrowed, sizeof(Unit));
        out[at + u * step] = units[u];
      }
    }
  }
};

// This block's part of the row.
template <class T>
__device__ void write_row_of(const RowGradient<acc_t<T>>& gradient, const T* row, T* out, int64_t vocab) {
  const RowPart<T> part(row, vocab);
  int64_t at = part.loose, step = vocab;
  if ((reinterpret_cast<uintptr_t>(row) - reinterpret_cast<uintptr_t>(out)) % 16 == 0) {
    const uint4* vectors = reinterpret_cast<const uint4*>(row + part.head);
    gradient.template write<T>(vectors, reinterpret_cast<uint4*>(out + part.head), part.head, part.begin + threadIdx.x,
                               part.end, threads);
  } else {  // no vector is aligned in both
    at = blockIdx.y * threads + threadIdx.x;
    step = gridDim.y * threads;
  }
  gradient.template write<T>(row, out, 0, at, vocab, step);
}

template <class T>
__device__ void write_zeros(T* out, int64_t vocab) {
  const RowPart<T> part(out, vocab);
  uint4* vectors = reinterpret_cast<uint4*>(out + part.head);
  for (int64_t at = part.begin + threadIdx.x; at < part.end; at += threads) vectors[at] = uint4{};
  if (part.loose < vocab) narrow(acc_t<T>(0), out + part.loose);
}

template <class T>
__global__ void __launch_bounds__(threads, resident<T>) backward(TokenStatsBackwardArgs args) {
  using A = acc_t<T>;
  const TokenStatsArgs& f = args.forward;
  for (int64_t r = blockIdx.x; r < f.rows; r += gridDim.x) {
    T* out = static_cast<T*>(args.grad_logits) + args.grad_layout.offset(r);
    if (f.labels[r] == f.ignore_index) {
      write_zeros(out, f.vocab);
      continue;
    }
    check_label(f.labels[r], f.entries);
    RowGradient<A> gradient{};
    gradient.label = f.labels[r] - f.first_entry;
    gradient.m = static_cast<const A*>(f.row_max)[r];
    gradient.log_s = static_cast<const A*>(f.log_sum)[r];
    gradient.entropy = static_cast<const A*>(f.entropy)[r];
    // d scaled logit / d logit, once for the row
    const A slope = gradient.inverse_temperature = static_cast<A>(f.inverse_temperature);
    if (args.grad_logps) gradient.g_logp = static_cast<const A*>(args.grad_logps)[r] * slope;
    if (args.grad_entropy) gradient.g_entropy = static_cast<const A*>(args.grad_entropy)[r] * slope;

    write_row_of(gradient, row_of<T>(f, r), out, f.vocab);
  }
}

template <class T>
__global__ void __launch_bounds__(threads, resident<T>) numerators(TokenStatsTileArgs args) {
  using A = acc_t<T>;
  const TokenStatsArgs& t = args.tile;
  for (int64_t r = blockIdx.x; r < t.rows; r += gridDim.x) {
    T* row = const_cast<T*>(row_of<T>(t, r));
    if (t.labels[r] == t.ignore_index) {
      write_zeros(row, t.vocab);
      continue;
    }
    RowGradient<A> gradient{};  // of the log-probability alone, with log s = 0
    gradient.label = t.labels[r] - t.first_entry;
    gradient.m = static_cast<const A*>(args.row_max)[r];
    gradient.g_logp = gradient.inverse_temperature = static_cast<A>(t.inverse_temperature);
    gradient.numerators = true;
    write_row_of(gradient, row, row, t.vocab);
  }
}

// ---- launches -------------------------------------------------------------------------------------------------------

// Into how many parts a row is cut, so that few rows occupy the whole device: enough for this many blocks in all, but
// none with less than one group of loads.
constexpr int64_t enough_blocks = 2048;

int parts_of(const TokenStatsArgs& args) {
  const int64_t size = args.dtype == DType::f64 ? 8 : args.dtype == DType::f32 ? 4 : 2;
  const int64_t least = threads * group * 16 / size, most = (args.vocab + least - 1) / least;
  const int64_t wanted = (enough_blocks + args.rows - 1) / args.rows;
  return static_cast<int>(wanted < most ? wanted : most);
}

template <class... Kernel>
auto of_dtype(DType dtype, Kernel... kernels) {
  return std::array{kernels...}[static_cast<size_t>(dtype)];
}

template <class Args>
void sum_up(const Args& args, const TokenStatsArgs& rows) {
  const int parts = parts_of(rows);
  launch(of_dtype(rows.dtype, sum_rows<float, Args>, sum_rows<double, Args>, sum_rows<__nv_bfloat16, Args>,
                  sum_rows<__half, Args>),
         rows.rows, parts, threads, args);
  if (parts > 1)
    launch(of_dtype(rows.dtype, merge_parts<float, Args>, merge_parts<double, Args>, merge_parts<__nv_bfloat16, Args>,
                    merge_parts<__half, Args>),
           (rows.rows + warps - 1) / warps, 1, threads, args, parts);
}

}  // namespace

int64_t token_stats_scratch(const TokenStatsArgs& args) {
  const int parts = parts_of(args);
  return parts > 1 ? 3 * args.rows * parts : 0;
}

void token_stats(const TokenStatsArgs& args) { sum_up(args, args); }

void token_stats_tile(const TokenStatsTileArgs& args) {
  sum_up(args, args.tile);
  if (args.numerators)
    launch(of_dtype(args.tile.dtype, numerators<float>, numerators<double>, numerators<__nv_bfloat16>,
                    numerators<__half>),
           args.tile.rows, parts_of(args.tile), threads, args);
}

void token_stats_backward(const TokenStatsBackwardArgs& args) {
  launch(of_dtype(args.forward.dtype, backward<float>, backward<double>, backward<__nv_bfloat16>, backward<__half>),
         args.forward.rows, parts_of(args.forward), threads, args);
}

}  // namespace mallowspo::cuda
