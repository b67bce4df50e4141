// token_stats forward and backward over a range of rows. Compiled once per instruction set, with MALLOWSPO_ISA naming
// the namespace. A row is read once, in blocks that stay in the L1 cache.
#include "row_kernels.h"

#include <type_traits>

#include "../core/token_stats.h"
#include "simd.h"

namespace mallowspo::cpu::MALLOWSPO_ISA {
namespace {

constexpr int64_t block = 1024;  // elements; a multiple of four vectors
constexpr int64_t lookahead = 8 * block;  // elements whose maximum is found before anything is summed

// The hardware's prefetcher stops at every page, and the first-level cache waits for few lines at a time: what comes from
// memory is asked for early, into the second level, and only shortly before its use into the first.
inline void prefetch(const void* at) {
  __builtin_prefetch(static_cast<const char*>(at) + 16384, 0, 2);
  __builtin_prefetch(static_cast<const char*>(at) + 1024);
}

template <class T>
constexpr bool is_half = sizeof(T) == 2;

constexpr float lowest(float) { return -3.402823466e38f; }
constexpr double lowest(double) { return -1.7976931348623157e308; }

// A block's logits as acc_t times the inverse temperature, padded with -inf to a whole number of groups; returns the
// padded length. Rounded here, once: fused with the subtraction of m they would not be the logits that m was chosen from.
template <class T>
int64_t stage(const T* row, int64_t count, acc_t<T> inverse_temperature, acc_t<T>* scratch) {
  constexpr int64_t group = 4 * Simd<acc_t<T>>::width;
  const int64_t padded = (count + group - 1) / group * group;
  for (int64_t k = 0; k < count; ++k) scratch[k] = widen(row[k]) * inverse_temperature;
  for (int64_t k = count; k < padded; ++k) scratch[k] = -static_cast<acc_t<T>>(__builtin_inf());
  return padded;
}

// What is known of a row after some of its logits; the sums by SIMD lane.
template <class A>
struct RowState {
  A m;
  Partial<Vec<A>> sums;
  A label_logit;

  Partial<A> total() const { return {sum_of<A>(sums.s), sum_of<A>(sums.t)}; }
};

// l - m, kept above the underflow so that a logit of -inf contributes 0 * finite = 0; NaN stays NaN.
template <class A>
Vec<A> shifted(Vec<A> l, A m) {
  return larger(Vec<A>{} + 2 * Simd<A>::underflow, l - m);
}

// Of `count` logits, a multiple of four vectors.
template <class S>
acc_t<S> block_max(const S* x, int64_t count) {
  using A = acc_t<S>;
  constexpr int per_load = Packed<S>::count;
  Vec<A> top[4];
  for (Vec<A>& t : top) t = Vec<A>{} + lowest(A{});
  for (int64_t k = 0; k < count; k += 4 * Simd<A>::width)
    for (int u = 0; u < 4; ++u) {
      if (u % per_load) continue;
      const Packed<S> logits = unpack(x + k + u * Simd<A>::width);
      for (int i = 0; i < per_load; ++i) top[u + i] = larger(logits.v[i], top[u + i]);
    }
  return max_of<A>(larger(larger(top[0], top[1]), larger(top[2], top[3])));
}

template <class A>
struct BlockSums {
  Partial<Vec<A>> sums;
  bool below;  // nothing reached m: no term was as large as 1; nor was there a -inf or a NaN
};

// `count` logits, a multiple of four vectors, against m. Not `guarded`, a -inf makes the sums NaN.
template <bool guarded, class S>
BlockSums<acc_t<S>> block_sums(const S* x, int64_t count, acc_t<S> m) {
  using A = acc_t<S>;
  constexpr int per_load = Packed<S>::count, loads = 4 / per_load;
  Partial<Vec<A>> p[4] = {};
  for (int64_t k = 0; k < count; k += 4 * Simd<A>::width)
    for (int u = 0; u < loads; ++u) {
      const S* at = x + k + u * per_load * Simd<A>::width;
      prefetch(at);
      const Packed<S> logits = unpack(at);
      for (int i = 0; i < per_load; ++i) {
        const Vec<A> d = guarded ? shifted<A>(logits.v[i], m) : logits.v[i] - m;
        accumulate(p[u * per_load + i], d, term_of<A>(d));
      }
    }
  const Vec<A> most = larger(larger(p[0].s, p[1].s), larger(p[2].s, p[3].s));
  const Partial<Vec<A>> sums = {(p[0].s + p[1].s) + (p[2].s + p[3].s), (p[0].t + p[1].t) + (p[2].t + p[3].t)};
  return {sums, !any_of((most >= 1) | ~(sums.t <= 0))};
}

// Moves the row to a larger maximum, if this is one.
template <class A>
void raise(RowState<A>& state, A top) {
  if (!(top > state.m)) return;
  const Vec<A> delta = shifted<A>(Vec<A>{} + state.m, top);
  shift(state.sums, delta, exp_of(delta));
  state.m = top;
}

// Adds a block to the row. Most blocks hold nothing above the maximum so far: one sweep is tried against that one, and
// made again where it turns out otherwise.
template <class S>
void add_block(const S* x, int64_t count, RowState<acc_t<S>>& state) {
  using A = acc_t<S>;
  BlockSums<A> block{};
  if (state.m > lowest(A{})) block = block_sums<false>(x, count, state.m);
  if (!block.below) {
    const A top = block_max(x, count);
    if (top > state.m || any_of(block.sums.t - block.sums.t != 0) || state.m == lowest(A{})) {
      raise(state, top);
      block = block_sums<true>(x, count, state.m);
    }
  }
  state.sums.s += block.sums.s;
  state.sums.t += block.sums.t;
}

template <class T>
void read_row(const TokenStatsArgs& args, int64_t r, acc_t<T>* scratch, RowState<acc_t<T>>& state) {
  using A = acc_t<T>;
  const T* row = static_cast<const T*>(args.logits) + args.layout.offset(r);
  const int64_t label = args.labels[r] - args.first_entry;
  const bool is_direct = !std::is_same_v<T, Float16> && args.inverse_temperature == 1;
  if constexpr (!std::is_same_v<T, Float16>) {
    // The k-th block has a new maximum, and is swept twice, with probability 1/k: not worth trying at the beginning.
    if (is_direct && state.m == lowest(A{}))
      raise(state, block_max(row, (args.vocab < lookahead ? args.vocab : lookahead) / block * block));
  }
  for (int64_t start = 0; start < args.vocab; start += block) {
    const int64_t count = args.vocab - start < block ? args.vocab - start : block;
    const bool has_label = label >= start && label < start + count;
    if constexpr (!std::is_same_v<T, Float16>) {
      if (count == block && is_direct) {
        if (has_label) state.label_logit = widen(row[label]);
        add_block(row + start, count, state);
        continue;
      }
    }
    const int64_t padded = stage(row + start, count, static_cast<A>(args.inverse_temperature), scratch);
    if (has_label) state.label_logit = scratch[label - start];
    add_block(scratch, padded, state);
  }
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
    RowState<A> state{lowest(A{}), {}, 0};
    read_row<T>(args, r, scratch, state);
    const Partial<A> sums = state.total();
    const A log_s = std::log(sums.s);
    logps[r] = log_prob_of(state.label_logit, state.m, log_s);
    entropy[r] = entropy_of(log_s, sums);
    row_max[r] = state.m;
    log_sum[r] = log_s;
  }
}

// out = map(logits) over a row, in place too.
template <class T, class Map>
void map_row(const TokenStatsArgs& args, const T* row, T* out, acc_t<T>* scratch, Map map) {
  using A = acc_t<T>;
  constexpr int w = Simd<A>::width;
  for (int64_t start = 0; start < args.vocab; start += block) {
    const int64_t count = args.vocab - start < block ? args.vocab - start : block;
    if constexpr (!std::is_same_v<T, Float16>) {
      if (count == block && args.inverse_temperature == 1) {
        for (int64_t k = start; k < start + count; k += Packed<T>::count * w) {
          prefetch(row + k);
          Packed<T> x = unpack(row + k);
          for (Vec<A>& v : x.v) v = map(v);
          pack(x, out + k);
        }
        continue;
      }
    }
    const int64_t padded = stage(row + start, count, static_cast<A>(args.inverse_temperature), scratch);
    for (int64_t k = 0; k < padded; k += w) store(scratch + k, map(load(scratch + k)));
    for (int64_t k = 0; k < count; ++k) narrow(scratch[k], out + start + k);
  }
}

template <class T>
void tile(const TokenStatsTileArgs& args, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const TokenStatsArgs& t = args.tile;
  A *row_max = static_cast<A*>(args.row_max), *sum = static_cast<A*>(args.sum);
  A *weighted = static_cast<A*>(args.weighted), *label_logit = static_cast<A*>(args.label_logit);
  const A inverse_temperature = static_cast<A>(t.inverse_temperature);
  alignas(64) A scratch[block];
  for (int64_t r = begin; r < end; ++r) {
    T* row = static_cast<T*>(const_cast<void*>(t.logits)) + t.layout.offset(r);
    const int64_t label = t.labels[r] - t.first_entry;
    if (t.labels[r] == t.ignore_index) {
      row_max[r] = sum[r] = weighted[r] = label_logit[r] = 0;
      if (args.numerators) std::memset(row, 0, t.vocab * sizeof(T));
      continue;
    }
    RowState<A> state{row_max[r], {}, label_logit[r]};
    state.sums.s[0] = sum[r];
    state.sums.t[0] = weighted[r];
    read_row<T>(t, r, scratch, state);
    const Partial<A> sums = state.total();
    const A log_s = std::log(sums.s);
    row_max[r] = state.m;
    sum[r] = args.last() ? log_s : sums.s;
    weighted[r] = args.last() ? entropy_of(log_s, sums) : sums.t;
    label_logit[r] = args.last() ? log_prob_of(state.label_logit, state.m, log_s) : state.label_logit;
    if (args.numerators) {
      map_row(t, row, row, scratch,
              [&](Vec<A> l) { return exp_of<is_half<T>>(shifted<A>(l, state.m), -inverse_temperature); });
      if (label >= 0 && label < t.vocab) narrow(A(0), row + label);
    }
  }
}

template <class T>
void backward(const TokenStatsBackwardArgs& args, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const TokenStatsArgs& f = args.forward;
  const A inverse_temperature = static_cast<A>(f.inverse_temperature);
  alignas(64) A scratch[block];
  for (int64_t r = begin; r < end; ++r) {
    const T* row = static_cast<const T*>(f.logits) + f.layout.offset(r);
    T* out = static_cast<T*>(args.grad_logits) + args.grad_layout.offset(r);
    const int64_t label = f.labels[r] - f.first_entry;
    if (f.labels[r] == f.ignore_index) {
      std::memset(out, 0, f.vocab * sizeof(T));
      continue;
    }
    const auto value = [r](const void* rows) {
      const A x = rows ? static_cast<const A*>(rows)[r] : A(0);
      return x == x ? x : static_cast<A>(__builtin_nan(""));  // one payload, see rounded_to_upper_half
    };
    const A g_logp = value(args.grad_logps) * inverse_temperature;
    const A g_entropy = value(args.grad_entropy) * inverse_temperature;
    const A entropy = value(f.entropy), m = value(f.row_max), log_s = value(f.log_sum);
    const auto gradient = [&](Vec<A> l) {
      const Vec<A> log_p = shifted<A>(l, m) - log_s;
      return logit_gradient(log_p, exp_of<is_half<T>>(log_p), g_logp, g_entropy, entropy);
    };
    // The same where g_entropy is 0, some operations shorter.
    const A scale = -g_logp * exp_of(-log_s);
    const auto without_entropy = [&](Vec<A> l) { return exp_of<is_half<T>>(shifted<A>(l, m), scale); };
    const bool has_label = label >= 0 && label < f.vocab;
    // Before the row is overwritten, where it is.
    const A own = has_label ? gradient(Vec<A>{} + widen(row[label]) * inverse_temperature)[0] + g_logp : A(0);
    if (g_entropy == 0)
      map_row(f, row, out, scratch, without_entropy);
    else
      map_row(f, row, out, scratch, gradient);
    if (has_label) narrow(own, out + label);
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
