#include "cpu/one_convolution.h"

namespace rkfast {
namespace {

class BnReluConv : OneConvolution {
  // Brings relu(BN(x)).
  struct Normalised {
    static constexpr bool kMade = true;
    Slot<const float> x;
    int64_t channels;
    const Read& read;

    void operator()(int64_t row, int64_t n, Slot<float> out) const {
      normalise_rows<float, float>({x.row(row), n, channels, read.scale.data(), read.shift.data(), out});
    }
    Slot<const float> here(int64_t row, int64_t n, int which) const {
      const int64_t pitch = channels + kPad;  // rows do not fall on the same cache lines
      const Slot<float> act{scratch(which, n * pitch), pitch};
      (*this)(row, n, act);
      return {act.data, act.pitch};
    }
  };
  Normalised normalised(const Read& read) const { return {x_, channels_, read}; }

 public:
  BnReluConv(const Tensor& x, const Tensor& conv, const Optional& weight, const Optional& bias, bool channels_last)
      : OneConvolution(x, conv, "conv", channels_last),
        norm_{vector("weight", weight, channels_), vector("bias", bias, channels_)} {}

  std::vector<Tensor> forward(const Optional& mean, const Optional& var, double eps, bool moments) {
    std::vector<Tensor> vectors;
    if (!mean) {
      const auto [own_mean, own_var] = channel_moments(given_, channels_last_);
      vectors = {own_mean, own_var};
    }
    const Read read = fold_with(mean ? *mean : vectors[0], mean ? *var : vectors[1], eps);
    forward_alone();
    Pieces taken(*this, moments);
    const Tensor out = convolved(normalised(read), nullptr, [&](int64_t piece, Slot<float> rows, int64_t, int64_t n) {
      taken.take(piece, {rows.data, rows.pitch}, n);
    });
    std::vector<Tensor> result{laid(out)};
    result.insert(result.end(), vectors.begin(), vectors.end());
    taken.append_to(result);
    return result;
  }

  std::vector<Tensor> backward(const Tensor& gradient, const Tensor& mean, const Tensor& var, bool batch_stats, double eps,
                               bool need_x, bool need_conv, bool need_affine) {
    const Tensor dense = like_images("grad", gradient, outputs_);
    return backward(Gradient{dense.const_data_ptr<float>()}, mean, var, batch_stats, eps, need_x, need_conv, need_affine);
  }
  std::vector<Tensor> backward_of_rows(const RowsOfGradient& make, const Tensor& mean, const Tensor& var, bool batch_stats,
                                       double eps, bool need_conv) {
    return backward(made_by_rows(make), mean, var, batch_stats, eps, true, need_conv, true);
  }

 private:
  std::vector<Tensor> backward(const Gradient& grad, const Tensor& mean, const Tensor& var, bool batch_stats, double eps,
                               bool need_x, bool need_conv, bool need_affine) {
    const Read read = fold_with(mean, var, eps);
    const bool need_data = need_x || need_affine;
    const int64_t pad = padded(channels_);
    Aligned<double> sums(need_data ? 2 * pieces() * pad : 0);
    // Back through ReLU, where the gradient of what was convolved is just written; scaled, so that BatchNorm's is only a
    // sum more.
    auto through_relu = [&](int64_t piece, Slot<float> d, int64_t pixel, int64_t n) {
      double* s = sums.data() + 2 * piece * pad;
      read_backward_rows<float, float>({{}, {d.data, d.pitch}, x_.row(pixel), n, channels_, read.scale.data(), read.shift.data(),
                          read.center.data(), {s, s + pad}, {}, d, true});
    };
    const auto [dx, dconv] = convolved_backward(grad, normalised(read), need_data, need_conv, through_relu);
    std::vector<Tensor> result;
    const Sums s = total(sums, read, channels_);
    if (need_x) {
      if (batch_stats) finish(read, s, dx.data_ptr<float>());
      result.push_back(laid(dx));
    }
    if (need_conv) result.push_back(dconv);
    if (need_affine) result.insert(result.end(), {as_tensor(s.product, given_), as_tensor(s.grad, given_)});
    return result;
  }

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
      finish_rows<float, float>({{d.data, d.pitch}, x_.row(from), to - from, channels_, read.center.data(), slope.data(), offset.data(), {}, 1.f, d});
    });
  }

  Optional norm_[4];
};

}  // namespace

std::vector<Tensor> bn_relu_conv(const Tensor& x, const Tensor& conv, const Optional& weight, const Optional& bias,
                                 const Optional& mean, const Optional& var, bool channels_last, double eps,
                                 bool moments) {
  WithinOp within;
  TORCH_CHECK_VALUE(mean.has_value() == var.has_value(), mean ? "var" : "mean", ": give mean and var, or neither");
  return BnReluConv(x, conv, weight, bias, channels_last).forward(mean, var, eps, moments);
}

std::vector<Tensor> bn_relu_conv_backward(const Tensor& grad, const Tensor& x, const Tensor& conv, const Optional& weight,
                                          const Optional& bias, const Tensor& mean, const Tensor& var, bool channels_last,
                                          bool batch_stats, double eps, bool need_x, bool need_conv, bool need_affine) {
  WithinOp within;
  return BnReluConv(x, conv, weight, bias, channels_last)
      .backward(grad, mean, var, batch_stats, eps, need_x, need_conv, need_affine);
}

std::vector<Tensor> bn_relu_conv_backward(const RowsOfGradient& grad, const Tensor& x, const Tensor& conv, const Optional& weight,
                                          const Optional& bias, const Tensor& mean, const Tensor& var, bool batch_stats,
                                          double eps, bool need_conv) {
  return BnReluConv(x, conv, weight, bias, true).backward_of_rows(grad, mean, var, batch_stats, eps, need_conv);
}

}  // namespace rkfast
