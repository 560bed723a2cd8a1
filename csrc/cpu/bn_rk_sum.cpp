#include "cpu/bn_rk_sum.h"

namespace rkfast {

namespace {

// normed: how terms[0] is, where it is.
std::vector<Tensor> summed(const Tensor& x, const Optional& weight, const Optional& bias, const Optional& mean,
                           const Optional& var, const std::vector<Tensor>& terms, const std::vector<double>& coeffs,
                           const Optional& step, bool channels_last, bool relu, double eps, bool moments, bool mask,
                           const Optional& out, const NormedTerm* normed) {
  TORCH_CHECK_VALUE(terms.size() < kMaxTerms && terms.size() == coeffs.size(),
                    "terms, coeffs: expected as many of each, at most 16");
  TORCH_CHECK_VALUE(mean.has_value() == var.has_value(), mean ? "var" : "mean", ": give mean and var, or neither");
  const Rows rows(x, channels_last);
  Operands operands(x, rows);
  const Operand normalised = operands.add(x);
  std::vector<Tensor> result{out ? *out : empty_rows(x, channels_last)};
  std::vector<Tensor> statistics;
  if (!mean) {
    auto [own_mean, own_var] = own_moments(x, normalised, rows, operands.all_dense());
    statistics = {own_mean, own_var};
  }
  const ScaledNorm norm(rows, weight, bias, mean ? *mean : statistics[0], mean ? *var : statistics[1], step, eps);

  Combine a{};
  a.dtype = dtype_of(x);
  a.n = static_cast<int>(terms.size()) + 1;
  a.relu = relu;
  a.out = operands.output(result[0]);
  for (int j = 0; j < a.n - 1; ++j) a.terms[j] = operands.add(terms[j]);
  a.terms[a.n - 1] = normalised;
  a.shape = shape_of(rows, norm.by_sample());
  a.shape.reverse = !mean;
  const int64_t join = join_rows(a.shape, operands.all_dense());
  a.out.inner *= join;
  for (int j = 0; j < a.n; ++j) a.terms[j].inner *= join;

  Vectors vectors(a.shape, moments_dtype(x.scalar_type()));
  const Folded folded = norm.fold(vectors);
  for (int j = 0; j < a.n - 1; ++j) a.factors[j] = {nullptr, 0, coeffs[j]};
  a.factors[a.n - 1] = folded.scale;
  a.shift = folded.shift;
  a.center = folded.center.vector;
  if (normed) {
    TORCH_CHECK_VALUE(!norm.by_sample(), "step: expected one value per channel, got ", step->sizes());
    const ScaledNorm other(rows, normed->weight, normed->bias, normed->mean, normed->var, {}, normed->eps);
    a.factors[0] = vectors.add(1, [&](int64_t, int64_t c) { return other.folded(c).scale; });
    a.shift = vectors.add(1, [&](int64_t, int64_t c) { return norm.step(0, c) * norm.bias(c) + other.folded(c).shift; });
  }
  if (mask) {
    result.push_back(empty_mask(x, rows));
    a.mask = result.back().mutable_data_ptr<uint8_t>();
  }
  result.insert(result.end(), statistics.begin(), statistics.end());
  Partials partials(a.shape, moments ? 2 : 0);
  if (moments) a.moments = partials.moments();
  a.stream = !moments && outgrows_cache(x, a.n + 1);
  if (x.numel() > 0) combine(a);
  if (moments) {
    auto [out_mean, out_var] = partials.merge_moments(x);
    result.push_back(out_mean);
    result.push_back(out_var);
  }
  return result;
}

}  // namespace

std::vector<Tensor> bn_rk_sum(const Tensor& x, const Optional& weight, const Optional& bias, const Optional& mean,
                              const Optional& var, const std::vector<Tensor>& terms, const std::vector<double>& coeffs,
                              const Optional& step, bool channels_last, bool relu, double eps, bool moments, bool mask,
                              const Optional& out) {
  WithinOp within;
  return summed(x, weight, bias, mean, var, terms, coeffs, step, channels_last, relu, eps, moments, mask, out, nullptr);
}

std::vector<Tensor> bn_rk_sum(const Tensor& x, const Optional& weight, const Optional& bias, const Tensor& mean, const Tensor& var,
                              const NormedTerm& term, const Optional& step, bool channels_last, double eps, bool mask) {
  return summed(x, weight, bias, mean, var, {term.x}, {1.0}, step, channels_last, true, eps, false, mask, {}, &term);
}

BnRkSumBackward::BnRkSumBackward(const Tensor& grad, const Tensor& x, const Optional& weight, const Optional& bias,
                                 const Tensor& mean, const Tensor& var, const Optional& step, const Optional& mask,
                                 const std::vector<double>& coeffs, bool channels_last, bool relu, bool batch_stats, double eps,
                                 bool need_x, bool need_affine, bool need_step, bool by_rows)
    : x_(x), rows_(x, channels_last), norm_(rows_, weight, bias, mean, var, step, eps), need_x_(need_x), operands_(x_, rows_) {
  TORCH_CHECK_VALUE(coeffs.size() < kMaxTerms, "terms: at most 16");
  TORCH_CHECK_VALUE(step || !need_step, "step: need_step asks for its gradient, and there is none");
  const int64_t channels = rows_.channels;
  if (need_x && !by_rows) dx_ = empty_rows(x, channels_last);
  for (size_t k = 0; k < coeffs.size(); ++k) dterms_.push_back(empty_rows(x, channels_last));

  Operand input = operands_.add(x);
  a_.dtype = dtype_of(x);
  a_.grad = operands_.add(grad);
  if (need_x) a_.outputs[a_.n_outputs++] = by_rows ? Operand{nullptr, 0, channels} : operands_.output(dx_);
  for (const Tensor& d : dterms_) a_.outputs[a_.n_outputs++] = operands_.output(d);
  a_.shape = shape_of(rows_, norm_.by_sample());
  const int64_t join = by_rows ? 1 : join_rows(a_.shape, operands_.all_dense());
  input.inner *= join;
  a_.grad.inner *= join;
  for (int k = 0; k < a_.n_outputs; ++k) a_.outputs[k].inner *= join;

  kept_ = std::make_unique<Vectors>(a_.shape, moments_dtype(x.scalar_type()));
  const Folded folded = norm_.fold(*kept_);
  a_.center = folded.center.vector;
  if (mask) {
    a_.mask = operands_.mask(*mask);
  } else if (relu) {
    recomputed_ = empty_mask(x, rows_);
    a_.mask = recomputed_.mutable_data_ptr<uint8_t>();
    sign_.shape = a_.shape;
    sign_.dtype = a_.dtype;
    sign_.n = 1;
    sign_.terms[0] = input;
    sign_.factors[0] = folded.scale;
    sign_.shift = folded.shift;
    sign_.center = a_.center;
    sign_.relu = true;
    a_.sign = &sign_;
  }

  // s0 = sum g' and s1 = sum g' x_hat, over the channel or over the channel of each sample; hs0 and hs1 with the step.
  const int64_t samples = norm_.by_sample() ? rows_.samples : 1;
  std::vector<double> s0, s1, hs0(channels), hs1(channels);
  if (need_affine || need_step || (need_x && batch_stats)) {
    Partials partials(a_.shape, 2);
    Backward r = a_;
    r.n_outputs = 0;
    r.sum_grad = true;
    r.n_summed = 1;
    r.summed[0] = input;
    r.sums = partials.data();
    if (x.numel() > 0) {
      backward(r);
    } else {
      partials.clear();
    }
    a_.sign = nullptr;
    a_.shape.reverse = true;
    s0 = partials.sums(0, norm_.by_sample());
    s1 = partials.sums(1, norm_.by_sample());
    for (int64_t n = 0; n < samples; ++n) {
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t i = n * channels + c;
        s1[i] *= norm_.rstd(c);
        hs0[c] += norm_.step(n, c) * s0[i];
        hs1[c] += norm_.step(n, c) * s1[i];
      }
    }
  }

  int k = 0;
  if (need_x) {
    a_.factors[k++] = folded.scale;
    if (batch_stats) {
      const double count = static_cast<double>(rows_.count());
      auto correction = [&](int64_t c) { return correct(norm_.rstd(c), norm_.weight(c), hs0[c], hs1[c], count); };
      a_.x = input;
      a_.slope = kept_->add(1, [&](int64_t, int64_t c) { return correction(c).slope; }).vector;
      a_.offset = kept_->add(1, [&](int64_t, int64_t c) { return correction(c).offset; }).vector;
    }
  }
  for (double c : coeffs) a_.factors[k++] = {nullptr, 0, c};
  if (need_affine) {
    Tensor dweight = empty_vector(x, {channels}), dbias = empty_vector(x, {channels});
    for (int64_t c = 0; c < channels; ++c) {
      store(dweight, c, hs1[c]);
      store(dbias, c, hs0[c]);
    }
    vectors_ = {dweight, dbias};
  }
  if (need_step) {
    Tensor dstep = empty_vector(x, step->sizes());
    for (int64_t n = 0; n < samples; ++n)
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t i = n * channels + c;
        store(dstep, i, norm_.weight(c) * s1[i] + norm_.bias(c) * s0[i]);
      }
    vectors_.push_back(dstep);
  }
}

std::vector<Tensor> BnRkSumBackward::finish() {
  a_.stream = outgrows_cache(x_, a_.n_outputs + 2);
  if (a_.n_outputs > 0 && x_.numel() > 0) backward(a_);
  return results();
}

void BnRkSumBackward::rows(int64_t first, int64_t n, void* dx) const {
  Backward some = a_;
  some.shape.inner = some.shape.unit = n;
  const int64_t size = x_.element_size();
  auto from = [&](Operand& t) { t.data = static_cast<const char*>(t.data) + first * t.inner * size; };
  from(some.grad);
  if (some.x.data != nullptr) from(some.x);
  for (int k = 0; k < some.n_outputs; ++k) {
    k == 0 && need_x_ ? void(some.outputs[0].data = dx) : from(some.outputs[k]);
  }
  if (some.mask != nullptr) some.mask += first * mask_bytes(rows_);
  backward(some);
}

std::vector<Tensor> BnRkSumBackward::results() const {
  std::vector<Tensor> result;
  if (dx_.defined()) result.push_back(dx_);
  result.insert(result.end(), vectors_.begin(), vectors_.end());
  result.insert(result.end(), dterms_.begin(), dterms_.end());
  return result;
}

std::vector<Tensor> bn_rk_sum_backward(const Tensor& grad, const Tensor& x, const Optional& weight,
                                       const Optional& bias, const Tensor& mean, const Tensor& var,
                                       const Optional& step, const Optional& mask, const std::vector<double>& coeffs,
                                       bool channels_last, bool relu, bool batch_stats, double eps, bool need_x,
                                       bool need_affine, bool need_step) {
  WithinOp within;
  return BnRkSumBackward(grad, x, weight, bias, mean, var, step, mask, coeffs, channels_last, relu, batch_stats, eps, need_x,
                         need_affine, need_step)
      .finish();
}

}  // namespace rkfast
