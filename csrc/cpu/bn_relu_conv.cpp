#include <ATen/core/grad_mode.h>

#include "cpu/convolution.h"

namespace rkfast {
namespace {

constexpr int64_t kBands = 32;  // at least, where an image has rows enough: no sum depends on the threads

class BnReluConv : Convolutions {
  // Brings relu(BN(x)).
  auto normalised(const Read& read) const {
    return [&read, this](int64_t row, int64_t n, Slot<float> out) {
      normalise_rows({x_.row(row), n, channels_, read.scale.data(), read.shift.data(), out});
    };
  }

 public:
  BnReluConv(const Tensor& x, const Tensor& conv, const Optional& weight, const Optional& bias)
      : Convolutions(x), channels_(x.size(1)), outputs_(conv.size(0)), bands_(n_, h_, w_, channels_ + outputs_, kBands),
        conv_(conv), norm_{vector("weight", weight, channels_), vector("bias", bias, channels_)} {
    TORCH_CHECK_VALUE(x.is_cpu() && x.scalar_type() == at::kFloat && x.dim() == 4 && x.numel() > 0,
                      "x: expected a float32 CPU tensor [N, C, H, W] that is not empty");
    TORCH_CHECK_VALUE(conv.is_cpu() && conv.scalar_type() == at::kFloat && conv.dim() == 4 && conv.size(1) == channels_ &&
                          conv.size(2) == conv.size(3) && conv.size(2) % 2 == 1,
                      "conv: expected a float32 CPU weight [K, ", channels_, ", n, n], n odd");
    const Rows rows(x, true);
    Pitch pitch;
    kept_ = conform(resolved(x), rows, pitch);
    x_ = {kept_.const_data_ptr<float>(), pitch.inner};
  }

  std::vector<Tensor> forward(const Optional& mean, const Optional& var, double eps, bool moments) {
    std::vector<Tensor> vectors;
    if (!mean) {
      const Moment own(channels_, kept_);
      take_moments_of(x_, channels_, own.mean.data_ptr<float>(), own.var.data_ptr<float>());
      vectors = {own.mean, own.var};
    }
    const Read read = fold_with(mean ? *mean : vectors[0], mean ? *var : vectors[1], eps);
    const Moment found(moments ? outputs_ : 0, kept_);
    float *found_mean = found.mean.data_ptr<float>(), *found_var = found.var.data_ptr<float>();
    Tensor out;
    if (by_tiles(conv_)) {
      out = empty_nhwc(outputs_);
      const Slot<float> to{out.data_ptr<float>(), outputs_};
      const int64_t pad = padded(outputs_);
      std::vector<double> means(moments ? bands_.count * pad : 0), m2(means.size());
      winograd(bands_, channels_, outputs_, by_rows(normalised(read), channels_), tile_weight(conv_, false), to,
               [&](int64_t band, int64_t pixel, int64_t n) {
                 if (moments)
                   moments_of_rows({{to.row(pixel).data, to.pitch}, n, outputs_, means.data() + band * pad, m2.data() + band * pad});
               });
      if (moments) merge(bands_, means, m2, outputs_, found_mean, found_var);
    } else {
      out = convolve(conv_, channels_, normalised(read));
      if (moments) take_moments_of({out.const_data_ptr<float>(), outputs_}, outputs_, found_mean, found_var);
    }
    std::vector<Tensor> result{out};
    result.insert(result.end(), vectors.begin(), vectors.end());
    if (moments) result.insert(result.end(), {found.mean, found.var});
    return result;
  }

  std::vector<Tensor> backward(const Tensor& gradient, const Tensor& mean, const Tensor& var, bool batch_stats, double eps,
                               bool need_x, bool need_conv, bool need_affine) {
    const Tensor dense = resolved(gradient).contiguous(at::MemoryFormat::ChannelsLast);
    TORCH_CHECK_VALUE(dense.is_cpu() && dense.scalar_type() == at::kFloat && dense.numel() == rows_ * outputs_,
                      "grad: expected a float32 CPU tensor like the result, got ", gradient.sizes());
    const float* grad = dense.const_data_ptr<float>();
    const Read read = fold_with(mean, var, eps);
    const bool need_data = need_x || need_affine;
    const int64_t pad = padded(channels_);
    std::vector<double> sums;
    Tensor dx, dconv;
    // Back through ReLU, once the gradient of what was convolved is there; scaled, for BatchNorm's is then one more sum.
    auto through_relu = [&](int64_t piece, int64_t pixel, int64_t n) {
      const Slot<float> d{dx.data_ptr<float>() + pixel * channels_, channels_};
      double* s = sums.data() + 2 * piece * pad;
      read_backward_rows({{}, {d.data, d.pitch}, x_.row(pixel), n, channels_, read.scale.data(), read.shift.data(),
                          read.center.data(), {s, s + pad}, {}, d, true});
    };
    if (by_tiles(conv_)) {
      if (need_data) {
        dx = empty_nhwc(channels_);
        sums.resize(2 * bands_.count * pad);
        data_gradient_by_tiles(bands_, grad, conv_, {dx.data_ptr<float>(), channels_}, through_relu);
      }
      if (need_conv) dconv = weight_gradient_by_tiles(grad, normalised(read), conv_);
    } else {
      std::tie(dx, dconv) = conv_backward(grad, outputs_, normalised(read), channels_, conv_);
      sums.resize(2 * parts_.count * pad);
      if (need_data) parts_.run([&](int64_t part, int64_t from, int64_t to) { through_relu(part, from, to - from); });
    }
    std::vector<Tensor> result;
    if (need_data) {
      const Sums s = total(sums, read, channels_);
      if (need_x) {
        if (batch_stats) finish(read, s, dx.data_ptr<float>());
        result.push_back(dx);
      }
      if (need_affine) result.insert(result.end(), {as_tensor(s.product, dense), as_tensor(s.grad, dense)});
    }
    if (need_conv) result.push_back(dconv);
    return result;
  }

 private:
  Read fold_with(const Tensor& mean, const Tensor& var, double eps) {
    norm_[2] = vector("mean", mean, channels_);
    norm_[3] = vector("var", var, channels_);
    return fold(norm_, channels_, eps, [](auto&&) {});
  }
  // What the moments' dependence on x adds to its gradient.
  void finish(const Read& read, const Sums& s, float* dx) const {
    Floats slope(padded(channels_)), offset(slope.size());
    const double count = static_cast<double>(rows_);
    for (int64_t c = 0; c < channels_; ++c) {
      slope[c] = static_cast<float>(-read.scales[c] * read.rstd[c] * s.product[c] / count);
      offset[c] = static_cast<float>(-read.scales[c] * s.grad[c] / count);
    }
    parts_.run([&](int64_t, int64_t from, int64_t to) {
      const Slot<float> d{dx + from * channels_, channels_};
      finish_rows({{d.data, d.pitch}, x_.row(from), to - from, channels_, read.center.data(), slope.data(), offset.data(), {}, 1.f, d});
    });
  }

  const int64_t channels_, outputs_;
  const Bands bands_;
  const Tensor conv_;
  Optional norm_[4];
  Tensor kept_;
  Slot<const float> x_;
};

}  // namespace

std::vector<Tensor> bn_relu_conv(const Tensor& x, const Tensor& conv, const Optional& weight, const Optional& bias,
                                 const Optional& mean, const Optional& var, double eps, bool moments) {
  WithoutAutocast guard;
  at::NoGradGuard no_grad;
  TORCH_CHECK_VALUE(mean.has_value() == var.has_value(), mean ? "var" : "mean", ": give mean and var, or neither");
  return BnReluConv(x, conv, weight, bias).forward(mean, var, eps, moments);
}

std::vector<Tensor> bn_relu_conv_backward(const Tensor& grad, const Tensor& x, const Tensor& conv, const Optional& weight,
                                          const Optional& bias, const Tensor& mean, const Tensor& var, bool batch_stats,
                                          double eps, bool need_x, bool need_conv, bool need_affine) {
  WithoutAutocast guard;
  at::NoGradGuard no_grad;
  return BnReluConv(x, conv, weight, bias).backward(grad, mean, var, batch_stats, eps, need_x, need_conv, need_affine);
}

}  // namespace rkfast
