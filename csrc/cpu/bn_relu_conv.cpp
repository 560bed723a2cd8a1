#include <ATen/core/grad_mode.h>
#include <c10/core/MemoryFormat.h>
#include <c10/util/strides.h>

#include "cpu/convolution.h"

namespace rkfast {
namespace {

constexpr int64_t kBands = 32;  // at least, where an image has rows enough: no sum depends on the threads

class BnReluConv : Convolutions<float> {
  // Brings relu(BN(x)).
  auto normalised(const Read& read) const {
    return [&read, this](int64_t row, int64_t n, Slot<float> out) {
      normalise_rows<float, float>({x_.row(row), n, channels_, read.scale.data(), read.shift.data(), out});
    };
  }

 public:
  BnReluConv(const Tensor& x, const Tensor& conv, const Optional& weight, const Optional& bias, bool channels_last)
      : Convolutions(x), channels_(x.size(1)), outputs_(conv.size(0)), bands_(n_, h_, w_, channels_ + outputs_, kBands),
        channels_last_(channels_last), given_(resolved(x)), conv_(resolved(conv)),
        norm_{vector("weight", weight, channels_), vector("bias", bias, channels_)} {
    TORCH_CHECK_VALUE(x.is_cpu() && x.scalar_type() == at::kFloat && x.dim() == 4 && x.numel() > 0,
                      "x: expected a float32 CPU tensor [N, C, H, W] that is not empty");
    TORCH_CHECK_VALUE(conv.is_cpu() && conv.scalar_type() == at::kFloat && conv.dim() == 4 && conv.size(1) == channels_ &&
                          conv.size(2) == conv.size(3) && conv.size(2) % 2 == 1,
                      "conv: expected a float32 CPU weight [K, ", channels_, ", n, n], n odd");
    const Rows rows(x, true);
    Pitch pitch;
    kept_ = conform(given_, rows, pitch);
    x_ = {kept_.const_data_ptr<float>(), pitch.inner};
  }

  std::vector<Tensor> forward(const Optional& mean, const Optional& var, double eps, bool moments) {
    std::vector<Tensor> vectors;
    if (!mean) {
      const auto [own_mean, own_var] = channel_moments(given_, channels_last_);
      vectors = {own_mean, own_var};
    }
    const Read read = fold_with(mean ? *mean : vectors[0], mean ? *var : vectors[1], eps);
    const auto load = normalised(read);
    const int64_t pad = padded(outputs_);
    std::vector<double> means, m2;
    Tensor out;
    auto take = [&](int64_t piece, int64_t pixel, int64_t n) {
      if (moments && n > 0)
        moments_of_rows<float>({{out.const_data_ptr<float>() + pixel * outputs_, outputs_}, n, outputs_, means.data() + piece * pad,
                         m2.data() + piece * pad});
    };
    const bool tiles = by_tiles(conv_);
    means.resize(moments ? (tiles ? bands_.count : parts_.count) * pad : 0);
    m2.resize(means.size());
    if (tiles) {
      out = empty_nhwc(outputs_);
      winograd(bands_, channels_, outputs_, by_rows(load, channels_), tile_weight(conv_, false),
               {out.data_ptr<float>(), outputs_}, take);
    } else if (conv_.size(2) == 1) {
      out = empty_nhwc(outputs_);
      product(load, out.data_ptr<float>(), take);
    } else {
      out = convolve(conv_, channels_, materialise(channels_, load));
      parts_.run([&](int64_t part, int64_t from, int64_t to) { take(part, from, to - from); });
    }
    std::vector<Tensor> result{laid(out)};
    result.insert(result.end(), vectors.begin(), vectors.end());
    if (moments) {
      const Moment found(outputs_, kept_);
      float *found_mean = found.mean.data_ptr<float>(), *found_var = found.var.data_ptr<float>();
      tiles ? merge(bands_, means, m2, outputs_, found_mean, found_var) : merge(parts_, means, m2, outputs_, found_mean, found_var);
      result.insert(result.end(), {found.mean, found.var});
    }
    return result;
  }

  std::vector<Tensor> backward(const Tensor& gradient, const Tensor& mean, const Tensor& var, bool batch_stats, double eps,
                               bool need_x, bool need_conv, bool need_affine) {
    const Tensor dense = resolved(gradient).contiguous(at::MemoryFormat::ChannelsLast);
    TORCH_CHECK_VALUE(dense.is_cpu() && dense.scalar_type() == at::kFloat && dense.dim() == 4 && dense.size(1) == outputs_ &&
                          dense.numel() == rows_ * outputs_,
                      "grad: expected a float32 CPU tensor like the result, got ", gradient.sizes());
    const float* grad = dense.const_data_ptr<float>();
    const Read read = fold_with(mean, var, eps);
    const auto load = normalised(read);
    const bool need_data = need_x || need_affine, tiles = by_tiles(conv_);
    const int64_t pad = padded(channels_);
    std::vector<double> sums(need_data ? 2 * (tiles ? bands_.count : parts_.count) * pad : 0);
    Tensor dx, dconv;
    // Back through ReLU, where the gradient of what was convolved is just written; scaled, so that BatchNorm's is only a
    // sum more.
    auto through_relu = [&](int64_t piece, int64_t pixel, int64_t n) {
      const Slot<float> d{dx.data_ptr<float>() + pixel * channels_, channels_};
      double* s = sums.data() + 2 * piece * pad;
      read_backward_rows<float, float>({{}, {d.data, d.pitch}, x_.row(pixel), n, channels_, read.scale.data(), read.shift.data(),
                          read.center.data(), {s, s + pad}, {}, d, true});
    };
    if (tiles) {
      if (need_data) {
        dx = empty_nhwc(channels_);
        data_gradient_by_tiles(bands_, grad, conv_, {dx.data_ptr<float>(), channels_}, through_relu);
      }
      if (need_conv) dconv = weight_gradient_by_tiles(grad, load, conv_);
    } else if (conv_.size(2) == 1) {
      if (need_data) dx = empty_nhwc(channels_);
      dconv = product_backward(grad, load, need_data ? dx.data_ptr<float>() : nullptr, need_conv, through_relu);
    } else {
      std::tie(dx, dconv) = conv_backward(grad, outputs_, load, channels_, conv_);
      if (need_data) parts_.run([&](int64_t part, int64_t from, int64_t to) { through_relu(part, from, to - from); });
    }
    std::vector<Tensor> result;
    const Sums s = total(sums, read, channels_);
    if (need_x) {
      if (batch_stats) finish(read, s, dx.data_ptr<float>());
      result.push_back(laid(dx));
    }
    if (need_conv) result.push_back(dconv);
    if (need_affine) result.insert(result.end(), {as_tensor(s.product, dense), as_tensor(s.grad, dense)});
    return result;
  }

 private:
  Read fold_with(const Tensor& mean, const Tensor& var, double eps) {
    norm_[2] = vector("mean", mean, channels_);
    norm_[3] = vector("var", var, channels_);
    return fold(norm_, channels_, eps, [](auto&&) {});
  }

  // The 1x1 convolution as a product, tile by tile; then(part, pixel, n) follows on each part.
  template <typename Load, typename Then>
  void product(const Load& load, float* out, const Then& then) {
    const float* weights = turned(conv_);
    parts_.run([&](int64_t part, int64_t from, int64_t to) {
      float* act = scratch(0, parts_.tile * channels_);
      parts_.tiles(from, to, [&](int64_t i, int64_t n) {
        load(i, n, Slot<float>{act, channels_});
        at::native::cpublas::brgemm(n, outputs_, channels_, channels_, outputs_, outputs_, false, act, weights, out + i * outputs_);
      });
      then(part, from, to - from);
    });
  }
  // The gradient of what was multiplied into dx, unless that is null, then(part, pixel, n) after each tile; and that of the
  // weight.
  template <typename Load, typename Then>
  Tensor product_backward(const float* grad, const Load& load, float* dx, bool need_conv, const Then& then) {
    const Tensor w = conv_.reshape({outputs_, channels_}).contiguous();
    const float* weights = w.const_data_ptr<float>();
    const int64_t tile = parts_.tile, size = outputs_ * channels_;
    const Tensor partial = at::empty({parts_.count, need_conv ? size : 0}, options_);
    float* products = partial.data_ptr<float>();
    parts_.run([&](int64_t part, int64_t from, int64_t to) {
      float *turned = scratch(0, tile * outputs_), *act = scratch(1, tile * channels_);
      if (need_conv && from == to) std::fill_n(products + part * size, size, 0.f);
      parts_.tiles(from, to, [&](int64_t i, int64_t n) {
        const float* g = grad + i * outputs_;
        if (need_conv) {
          transpose_rows({{g, outputs_}, n, outputs_, {turned, tile}});
          load(i, n, Slot<float>{act, channels_});
          at::native::cpublas::brgemm(outputs_, channels_, n, tile, channels_, channels_, i != from, turned, act, products + part * size);
        }
        if (!dx) return;
        at::native::cpublas::brgemm(n, channels_, outputs_, outputs_, channels_, channels_, false, g, weights, dx + i * channels_);
        then(part, i, n);
      });
    });
    return need_conv ? like(partial.sum(0).reshape(conv_.sizes()), conv_) : Tensor();
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
      finish_rows<float, float>({{d.data, d.pitch}, x_.row(from), to - from, channels_, read.center.data(), slope.data(), offset.data(), {}, 1.f, d});
    });
  }

  // In the layout of the call, with the strides that the fake kernels say.
  Tensor laid(const Tensor& t) const {
    const std::vector<int64_t> strides =
        channels_last_ ? c10::get_channels_last_strides_2d(t.sizes()) : at::IntArrayRef(c10::contiguous_strides(t.sizes())).vec();
    return t.strides() == at::IntArrayRef(strides) ? t : at::empty_strided(t.sizes(), strides, t.options()).copy_(t);
  }

  const int64_t channels_, outputs_;
  const Bands bands_;
  const bool channels_last_;
  const Tensor given_, conv_;
  Optional norm_[4];
  Tensor kept_;
  Slot<const float> x_;
};

}  // namespace

std::vector<Tensor> bn_relu_conv(const Tensor& x, const Tensor& conv, const Optional& weight, const Optional& bias,
                                 const Optional& mean, const Optional& var, bool channels_last, double eps,
                                 bool moments) {
  WithoutAutocast guard;
  at::NoGradGuard no_grad;
  TORCH_CHECK_VALUE(mean.has_value() == var.has_value(), mean ? "var" : "mean", ": give mean and var, or neither");
  return BnReluConv(x, conv, weight, bias, channels_last).forward(mean, var, eps, moments);
}

std::vector<Tensor> bn_relu_conv_backward(const Tensor& grad, const Tensor& x, const Tensor& conv, const Optional& weight,
                                          const Optional& bias, const Tensor& mean, const Tensor& var, bool channels_last,
                                          bool batch_stats, double eps, bool need_x, bool need_conv, bool need_affine) {
  WithoutAutocast guard;
  at::NoGradGuard no_grad;
  return BnReluConv(x, conv, weight, bias, channels_last)
      .backward(grad, mean, var, batch_stats, eps, need_x, need_conv, need_affine);
}

}  // namespace rkfast
