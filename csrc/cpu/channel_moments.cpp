#include <ATen/Version.h>
#include <ATen/ops/empty.h>

#include <string_view>

#include "common/arithmetic.h"
#include "cpu/host.h"

namespace rkfast {

Dispatch<Combine> combine;
Dispatch<Backward> backward;
Dispatch<MomentsOf> moments_of;

template <typename Args>
void Dispatch<Args>::operator()(const Args& args) const {
  static const int best = [] {
    const std::string capability = at::get_cpu_capability();
    return capability.rfind("AVX512", 0) == 0 ? 2 : capability.rfind("AVX2", 0) == 0 ? 1 : 0;
  }();
  int use = best;
  while (use > 0 && by_capability[use] == nullptr) --use;
  by_capability[use](args);
}

template struct Dispatch<Combine>;
template struct Dispatch<Backward>;
template struct Dispatch<MomentsOf>;

std::pair<Tensor, Tensor> Partials::merge_moments(const Tensor& x) {
  const int64_t channels = s_.channels(), padded = s_.padded(), splits = s_.splits();
  Tensor mean = empty_vector(x, {channels}), var = empty_vector(x, {channels});
  for (int64_t c = 0; c < channels; ++c) {
    Welford<double> all;
    for (int64_t k = 0; k < s_.partials(); ++k) {
      const int64_t rows = s_.channels_last ? std::min(s_.unit, s_.inner - k % splits * s_.unit) : s_.length;
      all.merge(static_cast<double>(rows), vector(0)[k * padded + c], vector(1)[k * padded + c]);
    }
    store(mean, c, all.mean);
    store(var, c, all.variance());
  }
  return {mean, var};
}

std::pair<Tensor, Tensor> channel_moments(const Tensor& x, bool channels_last) {
  WithoutAutocast guard;
  const Rows rows(x, channels_last);
  Operands operands(rows);
  MomentsOf a{shape_of(rows, false), dtype_of(x), operands.add(x), {}};
  Partials partials(a.shape, 2);
  a.moments = partials.moments();
  if (x.numel() == 0) std::fill_n(partials.data(), 2 * a.shape.partials() * a.shape.padded(), 0.0);
  else moments_of(a);
  return partials.merge_moments(x);
}

namespace {

// The running value of one channel after another, of any floating dtype.
template <typename F>
void update(const Tensor& running, double weight, F&& batch) {
  auto step = [&](double old, int64_t c) { return old + weight * (batch(c) - old); };
  if (running.scalar_type() == at::kFloat && running.is_contiguous()) {
    float* r = running.mutable_data_ptr<float>();
    for (int64_t c = 0; c < running.numel(); ++c) r[c] = static_cast<float>(step(r[c], c));
    running.unsafeGetTensorImpl()->bump_version();
    return;
  }
  const Tensor wide = running.to(at::kDouble).contiguous();
  double* r = wide.mutable_data_ptr<double>();
  for (int64_t c = 0; c < running.numel(); ++c) r[c] = step(r[c], c);
  if (!wide.is_same(running)) running.copy_(wide);
}

}  // namespace

void update_running_stats(const Tensor& mean, const Tensor& var, int64_t count, const std::vector<Tensor>& running_mean,
                          const std::vector<Tensor>& running_var, const std::vector<Tensor>& num_batches_tracked,
                          std::optional<double> momentum) {
  WithoutAutocast guard;
  for (const Tensor& n : num_batches_tracked) n.add_(1);
  if (count == 0) return;
  const Vector batch_mean(mean, mean.numel(), 0), batch_var(var, var.numel(), 0);
  const double unbiased = static_cast<double>(count) / static_cast<double>(std::max<int64_t>(count - 1, 1));
  for (size_t i = 0; i < running_mean.size(); ++i) {
    const double weight = momentum ? *momentum : 1.0 / num_batches_tracked[i].item<double>();
    update(running_mean[i], weight, [&](int64_t c) { return batch_mean.at(0, c); });
    update(running_var[i], weight, [&](int64_t c) { return unbiased * batch_var.at(0, c); });
  }
}

}  // namespace rkfast
