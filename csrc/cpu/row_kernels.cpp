// token_stats forward and backward over a range of rows. Compiled once per instruction set with MALLOWSPO_ISA naming the
// namespace. A row is read in blocks that stay in the L1 cache: one sweep for the block's maximum, one for the sums.
#include "row_kernels.h"

#include "../core/token_stats.h"
#include "simd.h"

namespace mallowspo::cpu::MALLOWSPO_ISA {
namespace {

constexpr int64_t block = 1024;  // elements; a multiple of four vectors

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

constexpr float lowest(float) { return -3.402823466e38f; }
constexpr double lowest(double) { return -1.7976931348623157e308; }

// The block's logits as acc_t times the inverse temperature, padded with -inf to a multiple of four vectors; the row
// itself where nothing needs to change. `count` becomes the padded length.
template <class T>
const acc_t<T>* staged(const T* row, int64_t& count, acc_t<T> inverse_temperature, acc_t<T>* scratch) {
  using A = acc_t<T>;
  constexpr int64_t group = 4 * Simd<A>::width;
  const int64_t padded = (count + group - 1) / group * group;
  if constexpr (sizeof(T) == sizeof(A)) {
    if (padded == count && inverse_temperature == 1) return row;
  }
  for (int64_t k = 0; k < count; ++k) scratch[k] = widen(row[k]) * inverse_temperature;
  for (int64_t k = count; k < padded; ++k) scratch[k] = -static_cast<A>(__builtin_inf());
  count = padded;
  return scratch;
}

template <class A>
A block_max(const A* x, int64_t count) {
  constexpr int w = Simd<A>::width;
  Vec<A> m0 = load(x), m1 = load(x + w), m2 = load(x + 2 * w), m3 = load(x + 3 * w);
  for (int64_t k = 4 * w; k < count; k += 4 * w) {
    m0 = larger(m0, load(x + k));
    m1 = larger(m1, load(x + k + w));
    m2 = larger(m2, load(x + k + 2 * w));
    m3 = larger(m3, load(x + k + 3 * w));
  }
  return max_of<A>(larger(larger(m0, m1), larger(m2, m3)));
}

// l - m, kept above the underflow so that a logit of -inf contributes 0 * finite = 0; NaN stays NaN.
template <class A>
Vec<A> shifted(Vec<A> l, A m) {
  const Vec<A> d = l - m, floor = Vec<A>{} + 2 * Simd<A>::underflow;
  return d < floor ? floor : d;
}

template <class A>
Partial<Vec<A>> block_sums(const A* x, int64_t count, A m) {
  constexpr int w = Simd<A>::width;
  Partial<Vec<A>> p[4] = {};
  for (int64_t k = 0; k < count; k += 4 * w)
    for (int u = 0; u < 4; ++u) {
      const Vec<A> d = shifted<A>(load(x + k + u * w), m);
      accumulate(p[u], d, exp_of(d));
    }
  return {(p[0].s + p[1].s) + (p[2].s + p[3].s), (p[0].t + p[1].t) + (p[2].t + p[3].t)};
}

// What is known of a row after some of its logits.
template <class A>
struct RowState {
  A m;
  Partial<A> sums;
  A label_logit;
};

template <class T>
void read_row(const TokenStatsArgs& args, int64_t r, acc_t<T>* scratch, RowState<acc_t<T>>& state) {
  using A = acc_t<T>;
  const T* row = static_cast<const T*>(args.logits) + args.layout.offset(r);
  const A inverse_temperature = static_cast<A>(args.inverse_temperature);
  const int64_t label = args.labels[r] - args.first_entry;
  Partial<Vec<A>> sums = {};
  sums.s[0] = state.sums.s;
  sums.t[0] = state.sums.t;
  for (int64_t start = 0; start < args.vocab; start += block) {
    int64_t count = args.vocab - start < block ? args.vocab - start : block;
    const bool has_label = label >= start && label < start + count;
    const A* x = staged(row + start, count, inverse_temperature, scratch);
    // Not recomputed from the row: fused with the subtraction of m it would be rounded otherwise than in the sums.
    if (has_label) state.label_logit = x[label - start];
    const A top = block_max(x, count);
    if (top > state.m) {
      const Vec<A> delta = shifted<A>(Vec<A>{} + state.m, top);
      shift(sums, delta, exp_of(delta));
      state.m = top;
    }
    const Partial<Vec<A>> more = block_sums(x, count, state.m);
    sums.s += more.s;
    sums.t += more.t;
  }
  state.sums = {sum_of<A>(sums.s), sum_of<A>(sums.t)};
}

template <class T>
void forward(const TokenStatsArgs& args, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  A *logps = static_cast<A*>(args.logps), *entropy = static_cast<A*>(args.entropy);
  A *row_max = static_cast<A*>(args.row_max), *log_sum = static_cast<A*>(args.log_sum);
  alignas(64) A scratch[block];
  for (int64_t r = begin; r < end; ++r) {
    if (args.labels[r] == args.ignore_index) {
      logps[r] = entropy[r] = row_max[r] = log_sum[r] = 0;
      continue;
    }
    RowState<A> state{lowest(A{}), {0, 0}, 0};
    read_row<T>(args, r, scratch, state);
    const A log_s = std::log(state.sums.s);
    logps[r] = log_prob_of(state.label_logit, state.m, log_s);
    entropy[r] = entropy_of(log_s, state.sums);
    row_max[r] = state.m;
    log_sum[r] = log_s;
  }
}

template <class T>
void tile(const TokenStatsTileArgs& args, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  A *row_max = static_cast<A*>(args.row_max), *sum = static_cast<A*>(args.sum);
  A *weighted = static_cast<A*>(args.weighted), *label_logit = static_cast<A*>(args.label_logit);
  alignas(64) A scratch[block];
  for (int64_t r = begin; r < end; ++r) {
    if (args.tile.labels[r] == args.tile.ignore_index) {
      row_max[r] = sum[r] = weighted[r] = label_logit[r] = 0;
      continue;
    }
    RowState<A> state{row_max[r], {sum[r], weighted[r]}, label_logit[r]};
    read_row<T>(args.tile, r, scratch, state);
    const A log_s = std::log(state.sums.s);
    row_max[r] = state.m;
    sum[r] = args.last() ? log_s : state.sums.s;
    weighted[r] = args.last() ? entropy_of(log_s, state.sums) : state.sums.t;
    label_logit[r] = args.last() ? log_prob_of(state.label_logit, state.m, log_s) : state.label_logit;
  }
}

template <class T>
void backward(const TokenStatsBackwardArgs& args, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  constexpr int w = Simd<A>::width;
  const TokenStatsArgs& f = args.forward;
  const T* logits = static_cast<const T*>(f.logits);
  T* grads = static_cast<T*>(args.grad_logits);
  const A inverse_temperature = static_cast<A>(f.inverse_temperature);
  alignas(64) A scratch[block], gradient[block];
  for (int64_t r = begin; r < end; ++r) {
    T* out = grads + args.grad_layout.offset(r);
    const int64_t label = f.labels[r] - f.first_entry;
    if (f.labels[r] == f.ignore_index) {
      std::memset(out, 0, f.vocab * sizeof(T));
      continue;
    }
    const T* row = logits + f.layout.offset(r);
    const A g_logp = args.grad_logps ? static_cast<const A*>(args.grad_logps)[r] : 0;
    const A g_entropy = args.grad_entropy ? static_cast<const A*>(args.grad_entropy)[r] : 0;
    const A entropy = static_cast<const A*>(f.entropy)[r];
    const A m = static_cast<const A*>(f.row_max)[r], log_s = static_cast<const A*>(f.log_sum)[r];
    for (int64_t start = 0; start < f.vocab; start += block) {
      const int64_t here = f.vocab - start < block ? f.vocab - start : block;
      int64_t count = here;
      const A* x = staged(row + start, count, inverse_temperature, scratch);
      for (int64_t k = 0; k < count; k += w) {
        const Vec<A> log_p = shifted<A>(load(x + k), m) - log_s;
        store(gradient + k, logit_gradient(log_p, exp_of(log_p), g_logp, g_entropy, entropy) * inverse_temperature);
      }
      if (label >= start && label < start + here) gradient[label - start] += g_logp * inverse_temperature;
      for (int64_t k = 0; k < here; ++k) narrow(gradient[k], out + start + k);
    }
  }
}

}  // namespace

#define MALLOWSPO_DISPATCH(DTYPE, CALL)             \
  switch (DTYPE) {                                  \
    case DType::f32: CALL<float>(args, begin, end); break;    \
    case DType::f64: CALL<double>(args, begin, end); break;   \
    case DType::bf16: CALL<BFloat16>(args, begin, end); break; \
    case DType::f16: CALL<Float16>(args, begin, end); break;  \
  }

void token_stats_rows(const TokenStatsArgs& args, int64_t begin, int64_t end) {
  MALLOWSPO_DISPATCH(args.dtype, forward)
}

void token_stats_tile_rows(const TokenStatsTileArgs& args, int64_t begin, int64_t end) {
  MALLOWSPO_DISPATCH(args.tile.dtype, tile)
}

void token_stats_backward_rows(const TokenStatsBackwardArgs& args, int64_t begin, int64_t end) {
  MALLOWSPO_DISPATCH(args.forward.dtype, backward)
}

}  // namespace mallowspo::cpu::MALLOWSPO_ISA
