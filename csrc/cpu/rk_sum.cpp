#include "cpu/host.h"

namespace rkfast {
namespace {

// Factors of a call: coefficients, and the steps that come with some of them.
class Steps {
 public:
  Steps(const std::vector<double>& coeffs, const std::vector<Optional>& steps, const Rows& rows)
      : coeffs_(coeffs), samples_(rows.samples) {
    TORCH_CHECK_VALUE(coeffs.size() < kMaxTerms && steps.size() == coeffs.size(),
                      "coeffs, steps: expected one each for at most 16 terms");
    for (const Optional& step : steps) {
      steps_.emplace_back("steps", step, rows.channels, 1.0, rows.samples);
      given_.push_back(step.has_value());
      any_ |= given_.back();
      by_sample_ |= steps_.back().by_sample();
    }
  }
  bool any() const { return any_; }
  bool by_sample() const { return by_sample_; }

  Factor factor(size_t j, Vectors& vectors) const {
    if (!given_[j]) return {nullptr, 0, coeffs_[j]};
    return vectors.add(steps_[j].by_sample() ? samples_ : 1,
                       [&](int64_t n, int64_t c) { return coeffs_[j] * steps_[j].at(n, c); });
  }

 private:
  const std::vector<double>& coeffs_;
  int64_t samples_;
  std::vector<Vector> steps_;
  std::vector<bool> given_;
  bool any_ = false, by_sample_ = false;
};

}  // namespace

std::vector<Tensor> rk_sum(const std::vector<Tensor>& terms, const std::vector<double>& coeffs,
                           const std::vector<Optional>& steps, const Optional& shift, bool channels_last, bool relu,
                           bool moments, bool mask, const Optional& out) {
  WithinOp within;
  TORCH_CHECK_VALUE(!terms.empty(), "terms: expected 1 to 16 tensors, got none");
  const Tensor& first = terms[0];
  TORCH_CHECK_VALUE(terms.size() == coeffs.size(), "coeffs: expected one per term");
  const Rows rows(first, channels_last);
  const Steps factors(coeffs, steps, rows);
  std::vector<Tensor> result{out ? *out : empty_rows(first, channels_last)};

  Operands operands(first, rows);
  Combine a{};
  a.dtype = dtype_of(first);
  a.n = static_cast<int>(terms.size());
  a.relu = relu;
  a.out = operands.output(result[0]);
  for (int j = 0; j < a.n; ++j) a.terms[j] = operands.add(terms[j]);
  if (mask) {
    result.push_back(empty_mask(first, rows));
    a.mask = result.back().mutable_data_ptr<uint8_t>();
  }
  a.shape = shape_of(rows, factors.by_sample());
  if (!factors.any() && !shift && !moments && operands.all_dense() && (!mask || rows.length() % 8 == 0)) {
    a.shape = flat_shape(rows.numel());
    flatten(a.out, a.shape);
    for (int j = 0; j < a.n; ++j) flatten(a.terms[j], a.shape);
  } else {
    const int64_t join = join_rows(a.shape, operands.all_dense());
    a.out.inner *= join;
    for (int j = 0; j < a.n; ++j) a.terms[j].inner *= join;
  }
  Vectors vectors(a.shape, moments_dtype(first.scalar_type()));
  for (int j = 0; j < a.n; ++j) a.factors[j] = factors.factor(j, vectors);
  if (shift) {
    const Vector v("shift", shift, rows.channels, 0);
    a.shift = vectors.add(1, [&](int64_t n, int64_t c) { return v.at(n, c); });
  }
  Partials partials(a.shape, moments ? 2 : 0);
  if (moments) a.moments = partials.moments();
  a.stream = !moments && outgrows_cache(first, a.n + 1);
  if (first.numel() > 0) combine(a);
  if (moments) {
    auto [mean, var] = partials.merge_moments(first);
    result.push_back(mean);
    result.push_back(var);
  }
  return result;
}

std::vector<Tensor> rk_sum_backward(const Tensor& grad, const Optional& mask, const std::vector<double>& coeffs,
                                    const std::vector<Optional>& steps, const std::vector<Tensor>& step_terms,
                                    const std::vector<double>& step_coeffs, const std::vector<bool>& per_sample,
                                    bool shift, bool channels_last) {
  WithinOp within;
  const Rows rows(grad, channels_last);
  const Steps factors(coeffs, steps, rows);
  TORCH_CHECK_VALUE(step_terms.size() < kMaxTerms && step_terms.size() == step_coeffs.size() &&
                        step_terms.size() == per_sample.size(),
                    "step_terms, step_coeffs, per_sample: expected as many of each, at most 16");
  const bool by_sample = std::find(per_sample.begin(), per_sample.end(), true) != per_sample.end();
  const bool sums = shift || !step_terms.empty();

  Operands operands(grad, rows);
  Backward a{};
  a.dtype = dtype_of(grad);
  a.grad = operands.add(grad);
  if (mask) a.mask = operands.mask(*mask);
  a.sum_grad = shift;
  a.n_summed = static_cast<int>(step_terms.size());
  for (int j = 0; j < a.n_summed; ++j) a.summed[j] = operands.add(step_terms[j]);
  a.n_outputs = static_cast<int>(coeffs.size());
  std::vector<Tensor> result;
  for (int k = 0; k < a.n_outputs; ++k) a.outputs[k] = operands.output(result.emplace_back(empty_rows(grad, channels_last)));
  a.shape = shape_of(rows, factors.by_sample() || by_sample);
  if (!factors.any() && !sums && operands.all_dense() && (!mask || rows.length() % 8 == 0)) {
    a.shape = flat_shape(rows.numel());
    flatten(a.grad, a.shape);
    for (int k = 0; k < a.n_outputs; ++k) flatten(a.outputs[k], a.shape);
  } else {
    const int64_t join = join_rows(a.shape, operands.all_dense());
    a.grad.inner *= join;
    for (int j = 0; j < a.n_summed; ++j) a.summed[j].inner *= join;
    for (int k = 0; k < a.n_outputs; ++k) a.outputs[k].inner *= join;
  }
  Vectors vectors(a.shape, moments_dtype(grad.scalar_type()));
  for (int k = 0; k < a.n_outputs; ++k) a.factors[k] = factors.factor(k, vectors);
  Partials partials(a.shape, sums ? 1 + a.n_summed : 0);
  if (sums) a.sums = partials.data();
  a.stream = outgrows_cache(grad, a.n_outputs + a.n_summed + 1);
  if (grad.numel() > 0) {
    backward(a);
  } else {
    partials.clear();
  }
  auto reduced = [&](int64_t which, bool each, double factor) {
    const std::vector<double> values = partials.sums(which, each);
    Tensor& d = result.emplace_back(
        each ? empty_vector(grad, {rows.samples, rows.channels}) : empty_vector(grad, {rows.channels}));
    for (size_t i = 0; i < values.size(); ++i) store(d, static_cast<int64_t>(i), factor * values[i]);
  };
  for (int j = 0; j < a.n_summed; ++j) reduced(1 + j, per_sample[j], step_coeffs[j]);
  if (shift) reduced(0, false, 1.0);
  return result;
}

}  // namespace rkfast
