// The per-pair operators on the CPU: plain loops, because a batch holds few pairs and all arithmetic is in double.
#include "../pairs.h"

#include <sstream>
#include <stdexcept>

namespace mallowspo::cpu {
namespace {

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
  for (int64_t i = 0; i < args.pairs; ++i) preference_loss_at<T>(args, i);
}

template <class T>
void log_probs(const MallowsArgs& args) {
  check_dispersion<T>(args.dispersion, args.count);
  for (int64_t i = 0; i < args.count; ++i) mallows_log_prob_at<T>(args, i);
}

}  // namespace

void preference_loss(const PairArgs& args) { args.dtype == DType::f64 ? losses<double>(args) : losses<float>(args); }
void preference_loss_backward(const PairArgs& args) { preference_loss(args); }
void mallows_log_prob(const MallowsArgs& args) { args.dtype == DType::f64 ? log_probs<double>(args) : log_probs<float>(args); }
void mallows_log_prob_backward(const MallowsArgs& args) { mallows_log_prob(args); }

}  // namespace mallowspo::cpu
