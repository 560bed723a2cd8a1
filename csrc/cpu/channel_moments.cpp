#include <ATen/Version.h>
#include <ATen/ops/empty.h>

#include <string_view>

#include "common/arithmetic.h"
#include "cpu/host.h"
#include "cpu/slots.h"

namespace rkfast {

int cpu_capability() {
  static const int best = [] {
    const std::string capability = at::get_cpu_capability();
    return capability.rfind("AVX512", 0) == 0 ? 2 : capability.rfind("AVX2", 0) == 0 ? 1 : 0;
  }();
  return best;
}

std::pair<Tensor, Tensor> Partials::merge_moments(const Tensor& x) {
  const int64_t channels = s_.channels(), padded = s_.padded();
  std::vector<double> mean(channels), m2(channels);
  double count = 0;
  for (int64_t k = 0; k < s_.partials(); ++k) {
    const int64_t rows = s_.channels_last ? std::min(s_.unit, s_.inner - k % s_.splits() * s_.unit) : s_.length;
    if (rows == 0) continue;
    for (int64_t r = 0; r < s_.replicas; ++r) {
      const double* other_mean = vector(0) + k * padded + r * channels;
      const double* other_m2 = vector(1) + k * padded + r * channels;
      const double share = static_cast<double>(rows) / (count + static_cast<double>(rows));
      for (int64_t c = 0; c < channels; ++c)
        chan_merge(mean[c], m2[c], other_mean[c], other_m2[c], count, share);
      count += static_cast<double>(rows);
    }
  }
  Tensor mean_out = empty_vector(x, {channels}), var_out = empty_vector(x, {channels});
  for (int64_t c = 0; c < channels; ++c) {
    store(mean_out, c, mean[c]);
    store(var_out, c, count > 0 ? m2[c] / count : 0.0);
  }
  return {mean_out, var_out};
}

std::vector<double> Partials::sums(int64_t which, bool by_sample) {
  const int64_t channels = s_.channels(), samples = by_sample ? s_.outer : 1;
  const int64_t each = samples > 0 ? s_.partials() / samples : 0;
  std::vector<double> result(samples * channels);
  for (int64_t k = 0; k < each * samples; ++k) {
    const double* part = vector(which) + k * s_.padded();
    double* to = result.data() + k / each * channels;
    for (int64_t r = 0; r < s_.replicas; ++r, part += channels)
      for (int64_t c = 0; c < channels; ++c) to[c] += part[c];
  }
  return result;
}

std::pair<Tensor, Tensor> channel_moments(const Tensor& x, bool channels_last) {
  WithinOp within;
  const Rows rows(x, channels_last);
  Operands operands(x, rows);
  const Operand operand = operands.add(x);
  return own_moments(x, operand, rows, operands.all_dense());
}

std::pair<Tensor, Tensor> own_moments(const Tensor& x, Operand operand, const Rows& rows, bool dense) {
  MomentsOf a{shape_of(rows, false), dtype_of(x), operand, {}};
  a.x.inner *= join_rows(a.shape, dense);
  Partials partials(a.shape, 2);
  a.moments = partials.moments();
  if (x.numel() > 0) moments_of(a);
  return partials.merge_moments(x);
}

namespace {

// It takes the first channels' share.
void check_running(const char* name, const Tensor& running, int64_t channels) {
  TORCH_CHECK_TYPE(at::isFloatingType(running.scalar_type()), name, ": expected a floating-point tensor, got ",
                   running.scalar_type());
  TORCH_CHECK_VALUE(running.is_cpu() && !running.is_neg() && running.dim() == 1 && running.size(0) <= channels &&
                        (running.stride(0) != 0 || running.size(0) < 2),
                    name, ": expected a CPU vector of at most ", channels, " channels with memory of its own, got ",
                    running.sizes(), " on ", running.device());
}

// The running value of one channel after another, of any floating dtype.
template <typename F>
void update(const Tensor& running, double weight, F&& batch) {
  auto step = [&](double old, int64_t c) { return old + weight * (batch(c) - old); };
  if (running.scalar_type() == at::kFloat && running.is_contiguous()) {
    float* r = running.mutable_data_ptr<float>();
    for (int64_t c = 0; c < running.numel(); ++c) r[c] = static_cast<float>(step(r[c], c));
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
  WithinOp within;
  const int64_t channels = mean.dim() == 1 ? mean.size(0) : -1;
  TORCH_CHECK_VALUE(channels >= 0, "mean: expected [C], got ", mean.sizes());
  const Vector batch_mean("mean", mean, channels, 0), batch_var("var", var, channels, 0);
  TORCH_CHECK_VALUE(count >= 0, "count: expected the number of values per channel, got ", count);
  TORCH_CHECK_VALUE(running_var.size() == running_mean.size(), "running_var: expected as many as running_mean, ",
                    running_mean.size(), ", got ", running_var.size());
  TORCH_CHECK_VALUE(momentum || num_batches_tracked.size() >= running_mean.size(),
                    "num_batches_tracked: the cumulative average needs a counter for each running_mean, ",
                    running_mean.size(), ", got ", num_batches_tracked.size());
  for (const Tensor& n : num_batches_tracked)
    TORCH_CHECK_VALUE(n.is_cpu() && n.numel() == 1, "num_batches_tracked: expected CPU tensors of one element, got ",
                      n.sizes(), " on ", n.device());
  for (size_t i = 0; i < running_mean.size(); ++i) {
    check_running("running_mean", running_mean[i], channels);
    check_running("running_var", running_var[i], running_mean[i].size(0));
    TORCH_CHECK_VALUE(running_var[i].size(0) == running_mean[i].size(0),
                      "running_var: expected the shape of running_mean, ", running_mean[i].sizes(), ", got ",
                      running_var[i].sizes());
  }
  for (const Tensor& n : num_batches_tracked) n.add_(1);
  if (count == 0) return;
  const double unbiased = static_cast<double>(count) / static_cast<double>(std::max<int64_t>(count - 1, 1));
  for (size_t i = 0; i < running_mean.size(); ++i) {
    const double weight = momentum ? *momentum : 1.0 / num_batches_tracked[i].item<double>();
    update(running_mean[i], weight, [&](int64_t c) { return batch_mean.at(0, c); });
    update(running_var[i], weight, [&](int64_t c) { return unbiased * batch_var.at(0, c); });
  }
}

}  // namespace rkfast
