// The per-pair operators on CUDA: one thread a pair, all arithmetic in double.
#include "../pairs.h"

#include "launch.h"

namespace mallowspo::cuda {
namespace {

constexpr int threads = 128;

template <class Args>
using Element = void (*)(const Args&, int64_t);

template <class Args, Element<Args> at>
__global__ void each(Args args, int64_t count) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * threads;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(threads) + threadIdx.x; i < count; i += step) at(args, i);
}

template <class Args, Element<Args> f32, Element<Args> f64>
void launch_elements(const Args& args, int64_t count) {
  launch(args.dtype == DType::f64 ? each<Args, f64> : each<Args, f32>, (count + threads - 1) / threads, 1,
         threads, args, count);
}

}  // namespace

void preference_loss(const PairArgs& args) {
  launch_elements<PairArgs, preference_loss_at<float>, preference_loss_at<double>>(args, args.pairs);
}
void mallows_log_prob(const MallowsArgs& args) {
  launch_elements<MallowsArgs, mallows_log_prob_at<float>, mallows_log_prob_at<double>>(args, args.count);
}

}  // namespace mallowspo::cuda
