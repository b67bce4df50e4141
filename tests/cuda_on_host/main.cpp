// Runs every CUDA kernel on the host (cuda_on_host.h) and compares it with the CPU's, case by case. The sources of the
// kernels are those of the extension. Exit code 0 and "ok: N comparisons" where all agree.
#include <algorithm>
#include <cstdio>
#include <functional>
#include <limits>
#include <random>
#include <string>

#include "../../csrc/cpu/row_kernels.h"
#include "cuda_on_host.h"

using namespace mallowspo;

namespace {

int compared = 0, failures = 0;
std::mt19937 generator(0);

template <class T>
double number(T x) {
  return static_cast<double>(x);
}
double number(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
T stored(double x) {
  return static_cast<T>(x);
}
template <>
__nv_bfloat16 stored(double x) {
  return __float2bfloat16_rn(static_cast<float>(x));
}

// Equal to rounding: the two sum in different orders. NaN agrees with NaN, an infinity with itself.
template <class T>
void compare(const std::string& what, const std::vector<T>& found, const std::vector<T>& expected, double tolerance) {
  for (size_t i = 0; i < expected.size(); ++i) {
    const double a = number(found[i]), b = number(expected[i]);
    ++compared;
    if ((a != a && b != b) || a == b || std::fabs(a - b) <= tolerance * (1 + std::fabs(b))) continue;
    if (++failures < 20) std::printf("%s[%zu]: CUDA %.9g, CPU %.9g\n", what.c_str(), i, a, b);
  }
}

RowLayout layout(int64_t rows, int64_t stride) {
  RowLayout out{};
  out.dims = 1;
  out.sizes[0] = rows;
  out.strides[0] = stride;
  return out;
}

// Runs a forward of the GPU with as much scratch as it asks for and no more; `rows` is a part of its arguments.
template <class A, class Args>
void run_forward(void (*forward)(const Args&), const Args& args, TokenStatsArgs& rows) {
  std::vector<A> scratch(cuda::token_stats_scratch(rows), std::numeric_limits<A>::quiet_NaN());
  rows.scratch = scratch.data();
  forward(args);
}

struct Shape {
  int64_t rows, vocab, stride, start;  // the first row begins `start` elements behind an aligned address
};

// All of token_stats for one dtype and shape: forward, backward, and the same in place over tiles of the vocabulary.
template <class T, class A>
void token_stats_case(DType dtype, Shape shape, double tolerance, double temperature) {
  const auto [rows, vocab, stride, start] = shape;
  const std::string name = std::to_string(rows) + "x" + std::to_string(vocab) + " dtype " + std::to_string(int(dtype));
  constexpr double infinity = std::numeric_limits<double>::infinity();
  std::normal_distribution<double> normal;
  std::vector<T> memory(start + (rows - 1) * stride + vocab);  // not one element more
  T* logits = memory.data() + start;
  for (T& x : memory) x = stored<T>(3 * normal(generator));
  if (rows > 5) {  // a masked logit, a NaN, a row of -inf, an infinity; further below an ignored row, not the last one
    logits[1] = stored<T>(-infinity);
    logits[stride] = stored<T>(std::numeric_limits<double>::quiet_NaN());
    for (int64_t v = 0; v < vocab; ++v) logits[2 * stride + v] = stored<T>(-infinity);
    logits[3 * stride + vocab / 2] = stored<T>(infinity);
  }
  std::vector<int64_t> labels(rows);
  for (int64_t& label : labels) label = static_cast<int64_t>(generator() % vocab);
  if (rows > 5) labels[4] = -100;

  struct Outputs {
    std::vector<A> logps, entropy, row_max, log_sum;
    Outputs(int64_t n, A unset) : logps(n, unset), entropy(n, unset), row_max(n, unset), log_sum(n, unset) {}
  };
  TokenStatsArgs base{};
  base.dtype = dtype;
  base.rows = rows;
  base.vocab = base.entries = vocab;
  base.ignore_index = -100;
  base.inverse_temperature = 1 / temperature;
  base.layout = layout(rows, stride);
  base.logits = logits;
  base.labels = labels.data();
  const auto with = [](TokenStatsArgs args, Outputs& out) {
    args.logps = out.logps.data();
    args.entropy = out.entropy.data();
    args.row_max = out.row_max.data();
    args.log_sum = out.log_sum.data();
    return args;
  };
  Outputs gpu(rows, 7), host(rows, 0);
  TokenStatsArgs on_gpu = with(base, gpu);
  run_forward<A>(cuda::token_stats, on_gpu, on_gpu);
  cpu::baseline::token_stats_rows(with(base, host), 0, rows);
  compare(name + " logps", gpu.logps, host.logps, tolerance);
  compare(name + " entropy", gpu.entropy, host.entropy, tolerance);
  compare(name + " row_max", gpu.row_max, host.row_max, tolerance);
  compare(name + " log_sum", gpu.log_sum, host.log_sum, tolerance);

  std::vector<A> grad_logps(rows), grad_entropy(rows);
  for (int64_t r = 0; r < rows; ++r) grad_logps[r] = normal(generator), grad_entropy[r] = normal(generator);
  for (int which = 1; which < 4; ++which) {  // logps alone, entropy alone, both
    std::vector<T> found(rows * vocab, stored<T>(7)), expected(rows * vocab);
    TokenStatsBackwardArgs args{};
    args.forward = with(base, host);
    args.grad_logps = which & 1 ? grad_logps.data() : nullptr;
    args.grad_entropy = which & 2 ? grad_entropy.data() : nullptr;
    args.grad_layout = layout(rows, vocab);
    args.grad_logits = found.data();
    cuda::token_stats_backward(args);
    args.grad_logits = expected.data();
    cpu::baseline::token_stats_backward_rows(args, 0, rows);
    compare(name + " grad", found, expected, std::max(tolerance, sizeof(T) == 2 ? 0.01 : 0.0));
  }

  std::vector<A> gpu_state(4 * rows), host_state(4 * rows);
  for (int64_t r = 0; r < rows; ++r) gpu_state[r] = host_state[r] = std::numeric_limits<A>::lowest();
  std::vector<T> gpu_grad = memory, host_grad = memory;
  std::vector<T> gpu_numerators = memory, host_numerators = memory;
  for (int pass = 0; pass < 2; ++pass)  // all tiles forward, then all tiles backward in place
    for (int64_t first = 0, width = (vocab + 2) / 3; first < vocab; first += width) {
      TokenStatsArgs tile = base;
      tile.first_entry = first;
      tile.vocab = std::min(width, vocab - first);
      const auto run = [&](std::vector<A>& state, std::vector<T>& grad, std::vector<T>& numerators, auto forward,
                           auto backward) {
        T* here = grad.data() + start + first;
        A* s = state.data();
        if (pass == 0) {
          tile.logits = numerators.data() + start + first;
          return forward(TokenStatsTileArgs{tile, true, s, s + rows, s + 2 * rows, s + 3 * rows});
        }
        tile.logits = here;
        tile.row_max = s, tile.log_sum = s + rows, tile.entropy = s + 2 * rows;
        backward(TokenStatsBackwardArgs{tile, grad_logps.data(), grad_entropy.data(), here, base.layout});
      };
      run(gpu_state, gpu_grad, gpu_numerators, [](TokenStatsTileArgs a) { run_forward<A>(cuda::token_stats_tile, a, a.tile); },
          cuda::token_stats_backward);
      run(host_state, host_grad, host_numerators,
          [&](const TokenStatsTileArgs& a) { cpu::baseline::token_stats_tile_rows(a, 0, rows); },
          [&](const TokenStatsBackwardArgs& a) { cpu::baseline::token_stats_backward_rows(a, 0, rows); });
    }
  compare(name + " tiles", gpu_state, host_state, tolerance);
  compare(name + " tiles numerators", gpu_numerators, host_numerators, std::max(tolerance, sizeof(T) == 2 ? 0.01 : 0.0));
  compare(name + " tiles grad", gpu_grad, host_grad, std::max(tolerance, sizeof(T) == 2 ? 0.01 : 0.0));
  const std::vector<A> whole_logps(host_state.begin() + 3 * rows, host_state.end());
  compare(name + " tiles against whole", whole_logps, host.logps, tolerance);
}

template <class T>
void pair_case(DType dtype, int64_t count) {
  std::normal_distribution<double> normal(0, 20);
  std::vector<std::vector<T>> inputs(5, std::vector<T>(count));
  for (int i = 0; i < 5; ++i)
    for (T& x : inputs[i]) x = static_cast<T>(i == 4 ? std::exp(normal(generator) / 10) : normal(generator));
  for (int64_t link = 0; link < link_count; ++link)
    for (const double smoothing : {0.0, 1.0})
      for (const bool robust : {false, true}) {
        const auto run = [&](auto operation) {
          std::vector<T> out(6 * count);
          PairArgs args{};
          args.dtype = dtype;
          args.pairs = count;
          // the rarer choices on one of two runs each: every branch is compared
          const double focal = smoothing == 0 ? 0.5 : 0, alpha = robust ? 0.7 : 1;
          const auto divergence = smoothing == 1 && robust ? Divergence::jensen_shannon : Divergence::alpha;
          args.objective = {static_cast<Link>(link), 0.1,   0.2,        0.1,   smoothing, robust,
                            focal,                   robust, divergence, alpha, 0.05};
          args.chosen = inputs[0].data(), args.rejected = inputs[1].data();
          if (robust) args.ref_chosen = inputs[2].data(), args.ref_rejected = inputs[3].data();
          args.dispersion = inputs[4].data();
          T* o = out.data();
          args.losses = o, args.chosen_rewards = o + count, args.rejected_rewards = o + 2 * count;
          args.slopes = o + 3 * count;
          operation(args);
          return out;
        };
        compare("link " + std::to_string(link), run(cuda::preference_loss), run(cpu::preference_loss), 1e-12);
      }
  const auto run = [&](auto operation) {
    std::vector<T> out(3 * count);
    operation(MallowsArgs{dtype, count, 1.0, inputs[0].data(), inputs[4].data(), out.data(), out.data() + count});
    return out;
  };
  compare("mallows", run(cuda::mallows_log_prob), run(cpu::mallows_log_prob), 1e-12);
}

}  // namespace

// With the argument "barriers" only what crosses threads within a block, because ThreadSanitizer is slow.
int main(int count, char** arguments) {
  const bool barriers = count > 1 && std::string(arguments[1]) == "barriers";
  // One entry, less than a vector, strided, odd and unaligned, vectors alone, rows cut into parts.
  std::vector<Shape> shapes = {{1, 1, 1, 0},     {6, 5, 5, 0},       {6, 255, 300, 0},
                               {6, 301, 301, 3}, {6, 1024, 1024, 0}, {6, 8501, 8501, 1}};
  if (barriers) shapes = {{6, 300, 300, 0}, {2, 4500, 4500, 0}};
  for (const Shape& shape : shapes) {
    token_stats_case<float, float>(DType::f32, shape, 2e-6, 1);
    if (barriers) continue;
    token_stats_case<double, double>(DType::f64, shape, 1e-13, 0.7);
    token_stats_case<__nv_bfloat16, float>(DType::bf16, shape, 2e-6, 1);
    token_stats_case<__half, float>(DType::f16, shape, 2e-6, 1.3);
  }
  // A row in 35 parts, more than a warp merges at once.
  if (!barriers) token_stats_case<double, double>(DType::f64, {1, 70001, 70001, 0}, 1e-13, 1);
  if (!barriers) token_stats_case<float, float>(DType::f32, {5, 301, 301, 3}, 2e-6, 1e46);  // 1 / temperature is 0
  for (const int64_t pairs : barriers ? std::vector<int64_t>{} : std::vector<int64_t>{1, 500}) {
    pair_case<float>(DType::f32, pairs);
    pair_case<double>(DType::f64, pairs);
  }
  std::printf("%s: %d comparisons, %d failures\n", failures ? "FAILED" : "ok", compared, failures);
  return failures != 0;
}
