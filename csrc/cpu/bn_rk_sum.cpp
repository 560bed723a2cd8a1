#include "common/arithmetic.h"
#include "cpu/host.h"

namespace rkfast {
namespace {

// step * BN(x) = scale * (x - mean) + shift, as vectors for the kernels.
struct Folded {
  Factor scale, shift, center;
};

class Norm {
 public:
  Norm(const Rows& rows, const Optional& weight, const Optional& bias, const Tensor& mean, const Tensor& var,
       const Optional& step, double eps)
      : weight_("weight", weight, rows.channels, 1.0),
        bias_("bias", bias, rows.channels, 0.0),
        mean_("mean", mean, rows.channels, 0.0),
        var_("var", var, rows.channels, 1.0),
        step_("step", step, rows.channels, 1.0, rows.samples),
        has_bias_(bias.has_value()),
        samples_(step_.by_sample() ? rows.samples : 1),
        eps_(eps) {}

  bool by_sample() const { return step_.by_sample(); }
  double weight(int64_t c) const { return weight_.at(0, c); }
  double bias(int64_t c) const { return bias_.at(0, c); }
  double step(int64_t n, int64_t c) const { return step_.at(n, c); }
  double rstd(int64_t c) const { return inverse_std(var_.at(0, c), eps_); }

  Folded fold(Vectors& vectors) const {
    Folded f;
    f.scale = vectors.add(samples_, [&](int64_t n, int64_t c) { return affine(n, c).scale; });
    if (has_bias_) {
      f.shift = vectors.add(samples_, [&](int64_t n, int64_t c) { return affine(n, c).shift; });
    } else {
      f.shift.scalar = 0;
    }
    f.center = vectors.add(1, [&](int64_t, int64_t c) { return mean_.at(0, c); });
    return f;
  }

 private:
  Affine<double> affine(int64_t n, int64_t c) const {
    return rkfast::fold(rstd(c), weight(c), bias(c), step(n, c));
  }

  Vector weight_, bias_, mean_, var_, step_;
  bool has_bias_;
  int64_t samples_;
  double eps_;
};

}  // namespace

std::vector<Tensor> bn_rk_sum(const Tensor& x, const Optional& weight, const Optional& bias, const Optional& mean,
                              const Optional& var, const std::vector<Tensor>& terms, const std::vector<double>& coeffs,
                              const Optional& step, bool channels_last, bool relu, double eps, bool moments, bool mask,
                              const Optional& out) {
  WithoutAutocast guard;
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
  const Norm norm(rows, weight, bias, mean ? *mean : statistics[0], mean ? *var : statistics[1], step, eps);

  Combine a{};
  a.dtype = dtype_of(x);
  a.n = static_cast<int>(terms.size()) + 1;
  a.relu = relu;
  a.out = operands.output(result[0]);
  for (int j = 0; j < a.n - 1; ++j) a.terms[j] = operands.add(terms[j]);
  a.terms[a.n - 1] = normalised;
  a.shape = shape_of(rows, norm.by_sample());
  a.shape.reverse = !mean;
  const int64_t join = join_rows(a.shape, operands.all_dense(), mask);
  a.out.inner *= join;
  for (int j = 0; j < a.n; ++j) a.terms[j].inner *= join;

  Vectors vectors(a.shape, moments_dtype(x.scalar_type()));
  const Folded folded = norm.fold(vectors);
  for (int j = 0; j < a.n - 1; ++j) a.factors[j] = {nullptr, 0, coeffs[j]};
  a.factors[a.n - 1] = folded.scale;
  a.shift = folded.shift;
  a.center = folded.center.vector;
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

std::vector<Tensor> bn_rk_sum_backward(const Tensor& grad, const Tensor& x, const Optional& weight,
                                       const Optional& bias, const Tensor& mean, const Tensor& var,
                                       const Optional& step, const Optional& mask, const std::vector<double>& coeffs,
                                       bool channels_last, bool relu, bool batch_stats, double eps, bool need_x,
                                       bool need_affine, bool need_step) {
  WithoutAutocast guard;
  TORCH_CHECK_VALUE(coeffs.size() < kMaxTerms, "terms: at most 16");
  TORCH_CHECK_VALUE(step || !need_step, "step: need_step asks for its gradient, and there is none");
  const Rows rows(x, channels_last);
  const int64_t channels = rows.channels;
  const Norm norm(rows, weight, bias, mean, var, step, eps);
  std::vector<Tensor> result;
  Tensor dx = need_x ? empty_rows(x, channels_last) : Tensor();
  std::vector<Tensor> dterms;
  for (size_t k = 0; k < coeffs.size(); ++k) dterms.push_back(empty_rows(x, channels_last));

  Operands operands(x, rows);
  Operand input = operands.add(x);
  Backward a{};
  a.dtype = dtype_of(x);
  a.grad = operands.add(grad);
  if (need_x) a.outputs[a.n_outputs++] = operands.output(dx);
  for (const Tensor& d : dterms) a.outputs[a.n_outputs++] = operands.output(d);
  a.shape = shape_of(rows, norm.by_sample());
  const int64_t join = join_rows(a.shape, operands.all_dense(), relu);
  input.inner *= join;
  a.grad.inner *= join;
  for (int k = 0; k < a.n_outputs; ++k) a.outputs[k].inner *= join;

  Vectors vectors(a.shape, moments_dtype(x.scalar_type()));
  const Folded folded = norm.fold(vectors);
  a.center = folded.center.vector;
  Combine sign{};
  Tensor recomputed;
  if (mask) {
    a.mask = operands.mask(*mask);
  } else if (relu) {
    recomputed = empty_mask(x, rows);
    a.mask = recomputed.mutable_data_ptr<uint8_t>();
    sign.shape = a.shape;
    sign.dtype = a.dtype;
    sign.n = 1;
    sign.terms[0] = input;
    sign.factors[0] = folded.scale;
    sign.shift = folded.shift;
    sign.center = a.center;
    sign.relu = true;
    a.sign = &sign;
  }

  // s0 = sum g' and s1 = sum g' x_hat, over the channel or over the channel of each sample; hs0 and hs1 with the step.
  const int64_t samples = norm.by_sample() ? rows.samples : 1;
  std::vector<double> s0, s1, hs0(channels), hs1(channels);
  if (need_affine || need_step || (need_x && batch_stats)) {
    Partials partials(a.shape, 2);
    Backward r = a;
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
    a.sign = nullptr;
    a.shape.reverse = true;
    s0 = partials.sums(0, norm.by_sample());
    s1 = partials.sums(1, norm.by_sample());
    for (int64_t n = 0; n < samples; ++n) {
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t i = n * channels + c;
        s1[i] *= norm.rstd(c);
        hs0[c] += norm.step(n, c) * s0[i];
        hs1[c] += norm.step(n, c) * s1[i];
      }
    }
  }

  int k = 0;
  if (need_x) {
    result.push_back(dx);
    a.factors[k++] = folded.scale;
    if (batch_stats) {
      const double count = static_cast<double>(rows.count());
      auto correction = [&](int64_t c) { return correct(norm.rstd(c), norm.weight(c), hs0[c], hs1[c], count); };
      a.x = input;
      a.slope = vectors.add(1, [&](int64_t, int64_t c) { return correction(c).slope; }).vector;
      a.offset = vectors.add(1, [&](int64_t, int64_t c) { return correction(c).offset; }).vector;
    }
  }
  for (double c : coeffs) a.factors[k++] = {nullptr, 0, c};
  if (need_affine) {
    Tensor dweight = empty_vector(x, {channels}), dbias = empty_vector(x, {channels});
    for (int64_t c = 0; c < channels; ++c) {
      store(dweight, c, hs1[c]);
      store(dbias, c, hs0[c]);
    }
    result.push_back(dweight);
    result.push_back(dbias);
  }
  if (need_step) {
    Tensor dstep = empty_vector(x, step->sizes());
    for (int64_t n = 0; n < samples; ++n)
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t i = n * channels + c;
        store(dstep, i, norm.weight(c) * s1[i] + norm.bias(c) * s0[i]);
      }
    result.push_back(dstep);
  }
  result.insert(result.end(), dterms.begin(), dterms.end());
  a.stream = outgrows_cache(x, a.n_outputs + 2);
  if (a.n_outputs > 0 && x.numel() > 0) backward(a);
  return result;
}

}  // namespace rkfast
