// The per-pair operators on the CPU: plain loops, in threads where the pairs are many; all arithmetic is in double or wider.
#include "../pairs.h"

#include <torch/csrc/stable/ops.h>

#include <sstream>
#include <stdexcept>

namespace mallowspo::cpu {
namespace {

// About this many pairs make a thread worth waking: one takes 0.03 to 0.2 microseconds (phi in float64: 1).
constexpr int64_t grain = 256;

// The dispersion is data from outside the model, so a bad value is named rather than turned into a NaN loss.
template <class T>
void check_dispersion(const void* dispersion, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const double a = element<T>(dispersion, i);
    if (a != checked_dispersion(a)) {
      std::ostringstream message;
      message << "neg_log_dispersion[" << i << "] is " << a
              << "; it is -log phi with phi in (0, 1], so it must be finite and >= 0";
      throw std::invalid_argument(message.str());
    }
  }
}

template <class T>
void losses(const PairArgs& args) {
  check_dispersion<T>(args.dispersion, args.pairs);
  torch::stable::parallel_for(0, args.pairs, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) preference_loss_at<T>(args, i);
  });
}

template <class T>
void log_probs(const MallowsArgs& args) {
  check_dispersion<T>(args.dispersion, args.count);
  torch::stable::parallel_for(0, args.count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) mallows_log_prob_at<T>(args, i);
  });
}

}  // namespace

void preference_loss(const PairArgs& args) { args.dtype == DType::f64 ? losses<double>(args) : losses<float>(args); }
void mallows_log_prob(const MallowsArgs& args) {
  args.dtype == DType::f64 ? log_probs<double>(args) : log_probs<float>(args);
}

}  // namespace mallowspo::cpu
