#include "cpu/one_convolution.h"

namespace rkfast {
namespace {

class Conv : OneConvolution {
  // Brings x.
  struct Plain {
    static constexpr bool kMade = false;  // it is there already
    Slot<const float> x;
    int64_t channels;

    void operator()(int64_t row, int64_t n, Slot<float> out) const {
      if (x.pitch == channels && out.pitch == channels) {
        std::copy_n(x.row(row).data, n * channels, out.data);
      } else {
        for (int64_t i = 0; i < n; ++i) std::copy_n(x.row(row + i).data, channels, out.row(i).data);
      }
    }
    Slot<const float> here(int64_t row, int64_t, int) const { return x.row(row); }
  };
  Plain plain() const { return {x_, channels_}; }

 public:
  // weight: [K, C, n, n], or that by tiles.
  Conv(const Tensor& x, const Tensor& weight, bool channels_last)
      : OneConvolution(x, weight.dim() == 3 ? shape_of_tiles(weight) : weight, "weight", channels_last) {
    if (weight.dim() != 3) return;
    TORCH_CHECK_VALUE(tiled(), "weight: tiles, where x has too few channels or pixels for them");
    tiles_given_ = weight.contiguous();
  }

  std::vector<Tensor> forward(const Optional& bias, const Optional& other, bool relu, bool moments) {
    const Optional given = vector("bias", bias, outputs_);
    Floats shift;
    if (given) {
      shift.resize(padded(outputs_));
      std::copy_n(data(given), outputs_, shift.data());
    }
    const Tensor added = other ? like_images("other", *other, outputs_) : Tensor();
    if (!tiles_given_) forward_alone();
    Pieces taken(*this, moments);
    const Tensor out = convolved(plain(), tiles_given_ ? tiles_given_->const_data_ptr<float>() : nullptr, [&](int64_t piece, Slot<float> rows, int64_t pixel, int64_t n) {
      if (given || other || relu) {
        Slot<const float> term;
        if (other) term = Slot<const float>{added.const_data_ptr<float>(), outputs_}.row(pixel);
        add_rows({{rows.data, rows.pitch}, term, n, outputs_, given ? shift.data() : nullptr, relu, rows});
      }
      taken.take(piece, {rows.data, rows.pitch}, n);
    });
    std::vector<Tensor> result{laid(out)};
    taken.append_to(result);
    return result;
  }

  std::vector<Tensor> backward(const Tensor& gradient, const Optional& other, bool need_x, bool need_weight) {
    const Tensor dense = like_images("grad", gradient, outputs_);
    return backward(Gradient{dense.const_data_ptr<float>()}, other, need_x, need_weight);
  }
  std::vector<Tensor> backward_of_rows(const RowsOfGradient& make, bool need_x, bool need_weight) {
    return backward(made_by_rows(make), {}, need_x, need_weight);
  }

 private:
  std::vector<Tensor> backward(const Gradient& grad, const Optional& other, bool need_x, bool need_weight) {
    const Tensor added = other ? like_images("other", *other, channels_) : Tensor();
    auto add = [&](int64_t, Slot<float> d, int64_t pixel, int64_t n) {
      if (other)
        add_rows({{d.data, d.pitch}, Slot<const float>{added.const_data_ptr<float>(), channels_}.row(pixel), n, channels_, nullptr, false, d});
    };
    const auto [dx, dweight] = convolved_backward(grad, plain(), need_x, need_weight, add);
    std::vector<Tensor> result;
    if (need_x) result.push_back(laid(dx));
    if (need_weight) result.push_back(dweight);
    return result;
  }

  // A weight of the shape that these tiles are made of, never read.
  static Tensor shape_of_tiles(const Tensor& tiles) {
    TORCH_CHECK_VALUE(tiles.is_cpu() && tiles.scalar_type() == at::kFloat && tiles.size(0) == 16,
                      "weight: expected [K, C, n, n], or tiles [16, C, K], float32 on the CPU, got ", tiles.sizes());
    return at::empty({1}, tiles.options()).expand({tiles.size(2), tiles.size(1), 3, 3});
  }

  Optional tiles_given_;
};

}  // namespace

std::vector<Tensor> conv(const Tensor& x, const Tensor& weight, const Optional& bias, const Optional& other,
                         bool channels_last, bool relu, bool moments) {
  WithinOp within;
  return Conv(x, weight, channels_last).forward(bias, other, relu, moments);
}

std::vector<Tensor> conv_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, const Optional& other,
                                  bool channels_last, bool need_x, bool need_weight) {
  WithinOp within;
  return Conv(x, weight, channels_last).backward(grad, other, need_x, need_weight);
}

std::vector<Tensor> conv_backward(const RowsOfGradient& grad, const Tensor& x, const Tensor& weight, bool need_x, bool need_weight) {
  return Conv(x, weight, true).backward_of_rows(grad, need_x, need_weight);
}

}  // namespace rkfast
