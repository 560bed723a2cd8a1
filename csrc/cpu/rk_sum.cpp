#include "cpu/host.h"

namespace rkfast {

std::vector<Tensor> rk_sum(const std::vector<Tensor>& terms, const std::vector<double>& coeffs,
                           const std::vector<Optional>& steps, const Optional& shift, bool channels_last, bool relu,
                           bool moments, bool mask, const Optional& out) {
  WithoutAutocast guard;
  const Tensor& first = terms.at(0);
  TORCH_CHECK_VALUE(terms.size() < kMaxTerms, "terms: at most 16, got ", terms.size());
  const Rows rows(first, channels_last);
  std::vector<Tensor> result{out ? *out : empty_rows(first, channels_last)};

  std::vector<Vector> factors;
  bool by_sample = false, per_channel = shift.has_value() || moments;
  factors.reserve(steps.size());
  for (const Optional& step : steps) {
    factors.emplace_back(step, rows.channels, 1.0);
    by_sample |= factors.back().by_sample();
    per_channel |= step.has_value();
  }

  Operands operands(rows);
  Combine a{};
  a.dtype = dtype_of(first);
  a.n = static_cast<int>(terms.size());
  a.relu = relu;
  a.out = output(result[0], rows);
  for (int j = 0; j < a.n; ++j) {
    a.terms[j] = operands.add(terms[j]);
    a.factors[j].scalar = coeffs.at(j);
  }
  if (mask) {
    result.push_back(empty_mask(first, rows));
    a.mask = result.back().mutable_data_ptr<uint8_t>();
  }
  a.shape = shape_of(rows, by_sample);
  // Mask bits of neighbouring rows are neighbours only where a row fills its bytes.
  if (!per_channel && operands.all_dense() && (!out || is_dense({a.out.outer, a.out.inner}, rows)) &&
      (!mask || rows.length() % 8 == 0)) {
    a.shape = flat_shape(rows.numel());
    flatten(a.out, a.shape);
    for (int j = 0; j < a.n; ++j) flatten(a.terms[j], a.shape);
  }
  Vectors vectors(a.shape, moments_dtype(first.scalar_type()));
  for (int j = 0; j < a.n; ++j) {
    if (!steps[j]) continue;
    a.factors[j] = vectors.add(factors[j].by_sample() ? rows.samples : 1,
                               [&](int64_t n, int64_t c) { return coeffs[j] * factors[j].at(n, c); });
  }
  if (shift) {
    const Vector v(shift, rows.channels, 0);
    a.shift = vectors.add(1, [&](int64_t n, int64_t c) { return v.at(n, c); });
  }
  if (!moments) {
    if (first.numel() > 0) combine(a);
    return result;
  }
  Partials partials(a.shape, 2);
  a.moments = partials.moments();
  if (first.numel() > 0) combine(a);
  else std::fill_n(partials.data(), 2 * a.shape.partials() * a.shape.padded(), 0.0);
  auto [mean, var] = partials.merge_moments(first);
  result.push_back(mean);
  result.push_back(var);
  return result;
}

std::vector<Tensor> rk_sum_backward(const Tensor& grad, const Optional& mask, const std::vector<double>& coeffs,
                                    const std::vector<Optional>& steps, const std::vector<Tensor>& step_terms,
                                    const std::vector<double>& step_coeffs, const std::vector<bool>& per_sample,
                                    bool shift, bool channels_last) {
  WithoutAutocast guard;
  const Rows rows(grad, channels_last);
  TORCH_CHECK_VALUE(coeffs.size() < kMaxTerms && step_terms.size() < kMaxTerms, "terms: at most 16");
  std::vector<Vector> factors;
  factors.reserve(steps.size());
  bool by_sample = false, per_channel = shift || !step_terms.empty();
  for (const Optional& step : steps) {
    factors.emplace_back(step, rows.channels, 1.0);
    by_sample |= factors.back().by_sample();
    per_channel |= step.has_value();
  }
  for (bool each : per_sample) by_sample |= each;

  Operands operands(rows);
  Backward a{};
  a.dtype = dtype_of(grad);
  a.grad = operands.add(grad);
  if (mask) a.mask = mask->const_data_ptr<uint8_t>();
  a.sum_grad = shift;
  a.n_summed = static_cast<int>(step_terms.size());
  for (int j = 0; j < a.n_summed; ++j) a.summed[j] = operands.add(step_terms[j]);
  a.n_outputs = static_cast<int>(coeffs.size());
  std::vector<Tensor> result;
  for (int k = 0; k < a.n_outputs; ++k) {
    result.push_back(empty_rows(grad, channels_last));
    a.outputs[k] = output(result.back(), rows);
    a.factors[k].scalar = coeffs[k];
  }
  a.shape = shape_of(rows, by_sample);
  if (!per_channel && operands.all_dense() && (!mask || rows.length() % 8 == 0)) {
    a.shape = flat_shape(rows.numel());
    flatten(a.grad, a.shape);
    for (int k = 0; k < a.n_outputs; ++k) flatten(a.outputs[k], a.shape);
  }
  Vectors vectors(a.shape, moments_dtype(grad.scalar_type()));
  for (int k = 0; k < a.n_outputs; ++k) {
    if (!steps[k]) continue;
    a.factors[k] = vectors.add(factors[k].by_sample() ? rows.samples : 1,
                               [&](int64_t n, int64_t c) { return coeffs[k] * factors[k].at(n, c); });
  }
  Partials partials(a.shape, shift || a.n_summed ? 1 + a.n_summed : 0);
  if (shift || a.n_summed) {
    a.sums = partials.data();
    if (grad.numel() == 0) std::fill_n(a.sums, (1 + a.n_summed) * a.shape.partials() * a.shape.padded(), 0.0);
  }
  if (grad.numel() > 0) backward(a);
  for (int j = 0; j < a.n_summed; ++j) {
    Tensor& d = result.emplace_back(
        per_sample[j] ? empty_vector(grad, {rows.samples, rows.channels}) : empty_vector(grad, {rows.channels}));
    for (int64_t c = 0; c < rows.channels; ++c) {
      if (!per_sample[j]) {
        store(d, c, step_coeffs[j] * partials.sum(1 + j, c));
        continue;
      }
      for (int64_t n = 0; n < rows.samples; ++n)
        store(d, n * rows.channels + c, step_coeffs[j] * partials.sum(1 + j, c, n));
    }
  }
  if (shift) {
    Tensor& d = result.emplace_back(empty_vector(grad, {rows.channels}));
    for (int64_t c = 0; c < rows.channels; ++c) store(d, c, partials.sum(0, c));
  }
  return result;
}

}  // namespace rkfast
