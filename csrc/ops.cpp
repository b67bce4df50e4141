// Every operator of torch.ops.mallowspo: its schema, its checks, its outputs, its backends.
//
// The code uses torch's stable C++ ABI only, so that one build serves every torch from 2.10 on. The checks here guard
// memory; the sentences a user reads come from mallowspo.functional. CPU kernels throw std::out_of_range and
// std::invalid_argument for bad values, which Python sees as IndexError and ValueError.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <optional>
#include <tuple>
#include <vector>

#include "rows.h"

namespace mallowspo {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Double: return DType::f64;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: STD_TORCH_CHECK(false, "expected a float32, float64, bfloat16 or float16 tensor");
  }
  return DType::f32;
}

// Sums run in float32, for float64 inputs in float64.
ScalarType accumulator_of(const Tensor& t) {
  return dtype_of(t) == DType::f64 ? ScalarType::Double : ScalarType::Float;
}

bool same_sizes(const Tensor& a, const Tensor& b, int64_t dims) {
  if (a.dim() < dims || b.dim() < dims) return false;
  for (int64_t d = 0; d < dims; ++d)
    if (a.size(d) != b.size(d)) return false;
  return true;
}

bool same_shape(const Tensor& a, const Tensor& b) { return a.dim() == b.dim() && same_sizes(a, b, a.dim()); }

void check_same(const Tensor& like, const Tensor& t, const char* name) {
  STD_TORCH_CHECK(same_shape(like, t), name, " has another shape than the first tensor");
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), name, " has another dtype than the first tensor");
  STD_TORCH_CHECK(t.device() == like.device(), name, " is on another device than the first tensor");
}

Tensor output(const Tensor& like) { return torch::stable::new_empty(like, like.sizes(), accumulator_of(like)); }

// [count, ...] for the derivatives of an output in `count` inputs.
Tensor slopes_of(const Tensor& like, int64_t count) {
  std::vector<int64_t> sizes{count};
  for (int64_t d = 0; d < like.dim(); ++d) sizes.push_back(like.size(d));
  return torch::stable::new_empty(like, sizes, accumulator_of(like));
}

// The input in its accumulator's dtype, contiguous; `keep` owns what had to be copied until the kernel has run.
struct Inputs {
  Tensor like;
  std::vector<Tensor> keep;

  const void* operator()(const Tensor& t, const char* name) {
    check_same(like, t, name);
    const bool as_it_is = t.scalar_type() == accumulator_of(t) && t.is_contiguous();  // spares two dispatches
    keep.push_back(as_it_is ? t : torch::stable::contiguous(torch::stable::to(t, accumulator_of(t))));
    return keep.back().const_data_ptr();
  }
  const void* operator()(const OptionalTensor& t, const char* name) { return t ? (*this)(*t, name) : nullptr; }
};

// Calls the backend's kernels for the tensor's device, on that device.
#if defined(MALLOWSPO_WITH_CUDA)
#define MALLOWSPO_RUN(ON, NAME, ARGS)                                              \
  do {                                                                             \
    if ((ON).is_cpu()) {                                                           \
      cpu::NAME(ARGS);                                                             \
    } else {                                                                       \
      const torch::stable::accelerator::DeviceGuard guard((ON).get_device_index()); \
      cuda::NAME(ARGS);                                                            \
    }                                                                              \
  } while (0)
#else
#define MALLOWSPO_RUN(ON, NAME, ARGS) cpu::NAME(ARGS)
#endif

// ---- token_stats ---------------------------------------------------------------------------------------------------

RowLayout layout_of(const Tensor& rows) {
  RowLayout layout{};
  layout.dims = static_cast<int>(rows.dim() - 1);
  for (int64_t d = 0; d < layout.dims; ++d) {
    layout.sizes[d] = rows.size(d);
    layout.strides[d] = rows.stride(d);
  }
  return layout;
}

// Fresh memory of many megabytes, on the CPU: its page faults would cost more than its arithmetic, so ask for pages of
// 2 MiB. Only a hint, so its answer is of no interest.
void advise_huge_pages(const Tensor& t) {
#if defined(__linux__)
  if (!t.is_cpu()) return;
  constexpr uintptr_t huge = uintptr_t{1} << 21;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(t.const_data_ptr());
  const uintptr_t end = begin + static_cast<uintptr_t>(t.numel()) * t.element_size();
  const uintptr_t first = (begin + huge - 1) / huge * huge, last = end / huge * huge;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// logits must have a contiguous last dimension and `labels` must be contiguous; both outlive the arguments.
TokenStatsArgs token_stats_args(const Tensor& logits, const Tensor& labels, int64_t ignore_index, double temperature) {
  const int64_t leading = logits.dim() - 1;
  STD_TORCH_CHECK(leading >= 0 && leading <= RowLayout::max_dims, "logits must have between 1 and 9 dimensions");
  STD_TORCH_CHECK(logits.size(leading) > 0, "logits has an empty vocabulary");
  STD_TORCH_CHECK(labels.dim() == leading && same_sizes(logits, labels, leading),
                  "labels must have the shape of logits without its last dimension");
  STD_TORCH_CHECK(labels.scalar_type() == ScalarType::Long, "labels must be int64");
  STD_TORCH_CHECK(labels.device() == logits.device(), "labels and logits are on different devices");
  STD_TORCH_CHECK(temperature > 0, "temperature must be positive");
  TokenStatsArgs args{};
  args.dtype = dtype_of(logits);
  args.rows = labels.numel();
  args.vocab = logits.size(leading);
  args.entries = args.vocab;
  args.ignore_index = ignore_index;
  args.inverse_temperature = 1 / temperature;
  args.layout = layout_of(logits);
  args.logits = logits.const_data_ptr();
  args.labels = labels.const_data_ptr<int64_t>();
  return args;
}

Tensor with_contiguous_rows(const Tensor& logits) {
  const int64_t last = logits.dim() - 1;
  return last >= 0 && logits.size(last) > 1 && logits.stride(last) != 1 ? torch::stable::contiguous(logits) : logits;
}

// What the CUDA kernels of a forward need besides the outputs; the tensor owns it until they are launched.
OptionalTensor with_scratch(TokenStatsArgs& args, const Tensor& logits) {
  int64_t numbers = 0;
#if defined(MALLOWSPO_WITH_CUDA)
  if (args.rows > 0 && !logits.is_cpu()) numbers = cuda::token_stats_scratch(args);
#endif
  if (numbers == 0) return {};
  const Tensor scratch = torch::stable::new_empty(logits, {numbers}, accumulator_of(logits));
  args.scratch = scratch.mutable_data_ptr();
  return scratch;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> token_stats(const Tensor& logits_in, const Tensor& labels_in,
                                                       int64_t ignore_index, double temperature) {
  const Tensor logits = with_contiguous_rows(logits_in), labels = torch::stable::contiguous(labels_in);
  TokenStatsArgs args = token_stats_args(logits, labels, ignore_index, temperature);
  const auto output = [&] { return torch::stable::new_empty(logits, labels.sizes(), accumulator_of(logits)); };
  const Tensor logps = output(), entropy = output(), row_max = output(), log_sum = output();
  args.logps = logps.mutable_data_ptr();
  args.entropy = entropy.mutable_data_ptr();
  args.row_max = row_max.mutable_data_ptr();
  args.log_sum = log_sum.mutable_data_ptr();
  const OptionalTensor scratch = with_scratch(args, logits);
  if (args.rows > 0) MALLOWSPO_RUN(logits, token_stats, args);
  return {logps, entropy, row_max, log_sum};
}

void check_tile(const Tensor& logits, int64_t first_entry, int64_t entries) {
  const int64_t last = logits.dim() - 1;
  STD_TORCH_CHECK(last >= 0 && (logits.size(last) == 1 || logits.stride(last) == 1), "a tile needs contiguous rows");
  STD_TORCH_CHECK(first_entry >= 0 && entries >= logits.size(last), "a tile lies inside the vocabulary");
}

void token_stats_tile(const Tensor& state, const Tensor& logits, const Tensor& labels_in, int64_t first_entry,
                      int64_t entries, int64_t ignore_index, double temperature, bool numerators) {
  const Tensor labels = torch::stable::contiguous(labels_in);
  check_tile(logits, first_entry, entries);
  TokenStatsTileArgs args{};
  args.numerators = numerators;
  args.tile = token_stats_args(logits, labels, ignore_index, temperature);
  args.tile.first_entry = first_entry;
  args.tile.entries = entries;
  STD_TORCH_CHECK(state.dim() == 2 && state.size(0) == 4 && state.size(1) == args.tile.rows && state.is_contiguous() &&
                      state.scalar_type() == accumulator_of(logits) && state.device() == logits.device(),
                  "state must be [4, rows], contiguous, in the accumulator's dtype");
  char* at = static_cast<char*>(state.mutable_data_ptr());
  void** const parts[] = {&args.row_max, &args.sum, &args.weighted, &args.label_logit};
  for (void** part : parts) {
    *part = at;
    at += args.tile.rows * static_cast<int64_t>(state.element_size());
  }
  const OptionalTensor scratch = with_scratch(args.tile, logits);
  if (args.tile.rows > 0) MALLOWSPO_RUN(logits, token_stats_tile, args);
}

// Everything the backward reads but the logits and labels; `saved` owns what had to be copied.
TokenStatsBackwardArgs token_stats_backward_args(Inputs& saved, const OptionalTensor& grad_logps,
                                                 const OptionalTensor& grad_entropy, const Tensor& logits,
                                                 const Tensor& labels, const Tensor& entropy, const Tensor& row_max,
                                                 const Tensor& log_sum, int64_t ignore_index, double temperature) {
  TokenStatsBackwardArgs args{};
  args.forward = token_stats_args(logits, labels, ignore_index, temperature);
  STD_TORCH_CHECK(same_shape(labels, entropy) && entropy.scalar_type() == accumulator_of(logits) &&
                      entropy.device() == logits.device(),
                  "entropy must be the output of token_stats for these logits");
  args.forward.entropy = const_cast<void*>(saved(entropy, "entropy"));
  args.forward.row_max = const_cast<void*>(saved(row_max, "row_max"));
  args.forward.log_sum = const_cast<void*>(saved(log_sum, "log_sum"));
  args.grad_logps = saved(grad_logps, "grad_logps");
  args.grad_entropy = saved(grad_entropy, "grad_entropy");
  return args;
}

Tensor token_stats_backward(const OptionalTensor& grad_logps, const OptionalTensor& grad_entropy,
                            const Tensor& logits_in, const Tensor& labels_in, const Tensor& entropy,
                            const Tensor& row_max, const Tensor& log_sum, int64_t ignore_index, double temperature) {
  const Tensor logits = with_contiguous_rows(logits_in), labels = torch::stable::contiguous(labels_in);
  Inputs saved{entropy, {}};
  TokenStatsBackwardArgs args = token_stats_backward_args(saved, grad_logps, grad_entropy, logits, labels, entropy,
                                                          row_max, log_sum, ignore_index, temperature);
  const Tensor grad = torch::stable::new_empty(logits, logits.sizes());
  advise_huge_pages(grad);
  args.grad_logits = grad.mutable_data_ptr();
  args.grad_layout = layout_of(grad);
  if (args.forward.rows > 0) MALLOWSPO_RUN(logits, token_stats_backward, args);
  return grad;
}

void token_stats_backward_tile(const Tensor& logits, const OptionalTensor& grad_logps,
                               const OptionalTensor& grad_entropy, const Tensor& labels_in, const Tensor& entropy,
                               const Tensor& row_max, const Tensor& log_sum, int64_t first_entry, int64_t entries,
                               int64_t ignore_index, double temperature) {
  const Tensor labels = torch::stable::contiguous(labels_in);
  check_tile(logits, first_entry, entries);
  Inputs saved{entropy, {}};
  TokenStatsBackwardArgs args = token_stats_backward_args(saved, grad_logps, grad_entropy, logits, labels, entropy,
                                                          row_max, log_sum, ignore_index, temperature);
  args.forward.first_entry = first_entry;
  args.forward.entries = entries;
  args.grad_logits = logits.mutable_data_ptr();
  args.grad_layout = args.forward.layout;
  if (args.forward.rows > 0) MALLOWSPO_RUN(logits, token_stats_backward, args);
}

// ---- preference_loss -----------------------------------------------------------------------------------------------

// The choices stand in the order of the schema, and of mallowspo.choices.PAIR_CHOICES.
PairArgs pair_args(Inputs& inputs, const Tensor& chosen, const Tensor& rejected, const OptionalTensor& ref_chosen,
                   const OptionalTensor& ref_rejected, const OptionalTensor& neg_log_dispersion, int64_t link,
                   double beta, double gamma, double label_smoothing, bool robust, double smoothing,
                   double focal_gamma, bool clip_rejected, int64_t divergence, double divergence_alpha,
                   double discopop_tau) {
  STD_TORCH_CHECK(link >= 0 && link < link_count, "unknown link ", link);
  STD_TORCH_CHECK(divergence >= 0 && divergence < divergence_count, "unknown divergence ", divergence);
  PairArgs args{};
  args.objective = {static_cast<Link>(link), beta, gamma, label_smoothing, smoothing, robust, focal_gamma,
                    clip_rejected, static_cast<Divergence>(divergence), divergence_alpha, discopop_tau};
  STD_TORCH_CHECK(neg_log_dispersion || !uses_dispersion(args.objective.link), "this link needs neg_log_dispersion");
  args.dtype = dtype_of(chosen) == DType::f64 ? DType::f64 : DType::f32;
  args.pairs = chosen.numel();
  args.chosen = inputs(chosen, "chosen_logps");
  args.rejected = inputs(rejected, "rejected_logps");
  args.ref_chosen = inputs(ref_chosen, "ref_chosen_logps");
  args.ref_rejected = inputs(ref_rejected, "ref_rejected_logps");
  args.dispersion = inputs(neg_log_dispersion, "neg_log_dispersion");
  return args;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> preference_loss(
    const Tensor& chosen, const Tensor& rejected, const OptionalTensor& ref_chosen, const OptionalTensor& ref_rejected,
    const OptionalTensor& neg_log_dispersion, int64_t link, double beta, double gamma, double label_smoothing,
    bool robust, double smoothing, double focal_gamma, bool clip_rejected, int64_t divergence, double divergence_alpha,
    double discopop_tau) {
  Inputs inputs{chosen, {}};
  PairArgs args = pair_args(inputs, chosen, rejected, ref_chosen, ref_rejected, neg_log_dispersion, link, beta, gamma,
                            label_smoothing, robust, smoothing, focal_gamma, clip_rejected, divergence,
                            divergence_alpha, discopop_tau);
  const Tensor losses = output(chosen), chosen_rewards = output(chosen), rejected_rewards = output(chosen);
  args.losses = losses.mutable_data_ptr();
  args.chosen_rewards = chosen_rewards.mutable_data_ptr();
  args.rejected_rewards = rejected_rewards.mutable_data_ptr();
  const Tensor slopes = slopes_of(chosen, 3);
  args.slopes = slopes.mutable_data_ptr();
  if (args.pairs > 0) MALLOWSPO_RUN(chosen, preference_loss, args);
  return {losses, chosen_rewards, rejected_rewards, slopes};
}

// ---- mallows_log_prob ----------------------------------------------------------------------------------------------

MallowsArgs mallows_args(Inputs& inputs, const Tensor& margin, const Tensor& neg_log_dispersion, double smoothing) {
  MallowsArgs args{};
  args.dtype = dtype_of(margin) == DType::f64 ? DType::f64 : DType::f32;
  args.count = margin.numel();
  args.smoothing = smoothing;
  args.margin = inputs(margin, "margin");
  args.dispersion = inputs(neg_log_dispersion, "neg_log_dispersion");
  return args;
}

std::tuple<Tensor, Tensor> mallows_log_prob(const Tensor& margin, const Tensor& neg_log_dispersion, double smoothing) {
  Inputs inputs{margin, {}};
  MallowsArgs args = mallows_args(inputs, margin, neg_log_dispersion, smoothing);
  const Tensor log_probs = output(margin), slopes = slopes_of(margin, 2);
  args.log_probs = log_probs.mutable_data_ptr();
  args.slopes = slopes.mutable_data_ptr();
  if (args.count > 0) MALLOWSPO_RUN(margin, mallows_log_prob, args);
  return {log_probs, slopes};
}

// The same functions serve every backend; MALLOWSPO_RUN picks the kernels.
void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("token_stats", TORCH_BOX(&token_stats));
  m.impl("token_stats_tile", TORCH_BOX(&token_stats_tile));
  m.impl("token_stats_backward_tile", TORCH_BOX(&token_stats_backward_tile));
  m.impl("token_stats_backward", TORCH_BOX(&token_stats_backward));
  m.impl("advise_huge_pages", TORCH_BOX(&advise_huge_pages));
  m.impl("preference_loss", TORCH_BOX(&preference_loss));
  m.impl("mallows_log_prob", TORCH_BOX(&mallows_log_prob));
}

}  // namespace
}  // namespace mallowspo

STABLE_TORCH_LIBRARY(mallowspo, m) {
  // logits [..., V], labels [...] -> logps, entropy, row_max, log_sum [...]
  m.def(
      "token_stats(Tensor logits, Tensor labels, int ignore_index, float temperature)"
      " -> (Tensor logps, Tensor entropy, Tensor row_max, Tensor log_sum)");
  m.def(
      "token_stats_backward(Tensor? grad_logps, Tensor? grad_entropy, Tensor logits, Tensor labels, Tensor entropy,"
      " Tensor row_max, Tensor log_sum, int ignore_index, float temperature) -> Tensor grad_logits");
  // The same over tiles of the vocabulary: logits [N, W] of the entries first_entry ... of `entries` in all. `state`
  // [4, N] holds m, s, t and the label's logit so far, after the last tile m, log s, entropy and log-probability;
  // with `numerators` the logits become -e^(l - m) / temperature, 0 for the label. The backward overwrites the logits
  // with their gradient.
  m.def(
      "token_stats_tile(Tensor(a!) state, Tensor(b!) logits, Tensor labels, int first_entry, int entries,"
      " int ignore_index, float temperature, bool numerators) -> ()");
  m.def(
      "token_stats_backward_tile(Tensor(a!) logits, Tensor? grad_logps, Tensor? grad_entropy, Tensor labels,"
      " Tensor entropy, Tensor row_max, Tensor log_sum, int first_entry, int entries, int ignore_index,"
      " float temperature) -> ()");
  m.def("advise_huge_pages(Tensor t) -> ()");
  // all [B]; `link` is mallowspo._C.Link, `divergence` mallowspo._C.Divergence. The losses' derivatives in the two
  // log-ratios and in the dispersion, `slopes` [3, B], come out of the same arithmetic, so the backward is one product.
  m.def(
      "preference_loss(Tensor chosen_logps, Tensor rejected_logps, Tensor? ref_chosen_logps,"
      " Tensor? ref_rejected_logps, Tensor? neg_log_dispersion, int link, float beta, float gamma,"
      " float label_smoothing, bool robust, float smoothing, float focal_gamma, bool clip_rejected, int divergence,"
      " float divergence_alpha, float discopop_tau)"
      " -> (Tensor losses, Tensor chosen_rewards, Tensor rejected_rewards, Tensor slopes)");
  // margin and neg_log_dispersion of one shape; slopes [2, ...] in the two
  m.def(
      "mallows_log_prob(Tensor margin, Tensor neg_log_dispersion, float smoothing)"
      " -> (Tensor log_probs, Tensor slopes)");
}

STABLE_TORCH_LIBRARY_IMPL(mallowspo, CPU, m) { mallowspo::implement(m); }
#if defined(MALLOWSPO_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(mallowspo, CUDA, m) { mallowspo::implement(m); }
#endif
