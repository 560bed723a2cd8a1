// BatchNorm inside the sum, and its backward in two steps, of which the second may go by rows. For host code.
#pragma once

#include "common/arithmetic.h"
#include "cpu/host.h"

namespace rkfast {

// step * BN(x) = scale * (x - mean) + shift, as vectors for the kernels.
struct Folded {
  Factor scale, shift, center;
};

class ScaledNorm {
 public:
  ScaledNorm(const Rows& rows, const Optional& weight, const Optional& bias, const Tensor& mean, const Tensor& var,
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

  // Without the center: scale * x + shift.
  Affine<double> folded(int64_t c) const {
    const Affine<double> a = affine(0, c);
    return {a.scale, a.shift - a.scale * mean_.at(0, c)};
  }

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

// A term of the sum that is normalised, too.
struct NormedTerm {
  const Tensor& x;
  const Optional &weight, &bias;
  const Tensor &mean, &var;
  double eps;
};

// relu(BN(term) + step * BN(x)) with the statistics given; [out] and, where asked for, the mask.
std::vector<Tensor> bn_rk_sum(const Tensor& x, const Optional& weight, const Optional& bias, const Tensor& mean, const Tensor& var,
                              const NormedTerm& term, const Optional& step, bool channels_last, double eps, bool mask);

// With g' the gradient behind the ReLU: the sums over g' when it is made, gradients of x and of the terms after that.
class BnRkSumBackward {
 public:
  // coeffs: of the terms whose gradients are asked for. by_rows: `rows` follows in place of `finish`.
  BnRkSumBackward(const Tensor& grad, const Tensor& x, const Optional& weight, const Optional& bias, const Tensor& mean,
                  const Tensor& var, const Optional& step, const Optional& mask, const std::vector<double>& coeffs,
                  bool channels_last, bool relu, bool batch_stats, double eps, bool need_x, bool need_affine, bool need_step,
                  bool by_rows = false);
  BnRkSumBackward(const BnRkSumBackward&) = delete;

  // Writes all gradients, and returns [dx], [dweight, dbias], [dstep], [dterms ...].
  std::vector<Tensor> finish();
  // Writes those of n channels_last rows: dx [n, C] there, which is not among the results then, and dterms.
  void rows(int64_t first, int64_t n, void* dx) const;
  // The same without dx, to be written by then.
  std::vector<Tensor> results() const;

 private:
  const Tensor x_;
  const Rows rows_;
  const ScaledNorm norm_;
  const bool need_x_;
  Operands operands_;
  Backward a_{};
  Combine sign_{};
  Tensor recomputed_, dx_;
  std::vector<Tensor> dterms_, vectors_;
  std::unique_ptr<Vectors> kept_;
};

}  // namespace rkfast
