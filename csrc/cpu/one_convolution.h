// A single convolution over channels_last images in float, forward and backward: what ops around one share. For host code.
#pragma once

#include <functional>

#include "cpu/convolution.h"

namespace rkfast {

class OneConvolution : protected Convolutions<float> {
 protected:
  // Pixels for each channel from which on tiles win, forward alone, and with the backward.
  static constexpr double kForward = 1.5, kBoth = 0.15;
  static constexpr int64_t kBands = 32;  // at least, where an image has rows enough: no sum depends on the threads

  // `name` is that of the weight.
  OneConvolution(const Tensor& x, const Tensor& conv, const char* name, bool channels_last)
      : Convolutions(checked(x)), channels_(x.size(1)), outputs_(conv.size(0)), bands_(n_, h_, w_, channels_ + outputs_, kBands),
        channels_last_(channels_last), given_(resolved(x)), conv_(resolved(conv)) {
    TORCH_CHECK_VALUE(conv.is_cpu() && conv.scalar_type() == at::kFloat && conv.dim() == 4 && conv.size(1) == channels_ &&
                          conv.size(2) == conv.size(3) && conv.size(2) % 2 == 1,
                      name, ": expected a float32 CPU weight [K, ", channels_, ", n, n], n odd");
    tiled_ = by_tiles(conv_) && pays(kBoth);
    kept_ = as_rows(given_, x_);
  }

  static const Tensor& checked(const Tensor& x) {
    TORCH_CHECK_VALUE(x.is_cpu() && x.scalar_type() == at::kFloat && x.dim() == 4 && x.numel() > 0,
                      "x: expected a float32 CPU tensor [N, C, H, W] that is not empty");
    return x;
  }
  // `rows` become those of the result, which is t or a copy.
  Tensor as_rows(const Tensor& t, Slot<const float>& rows) const {
    Pitch pitch;
    Tensor kept = conform(t, Rows(t, true), pitch);
    rows = {kept.const_data_ptr<float>(), pitch.inner};
    return kept;
  }
  // A gradient or what is added, like the result or like x.
  Tensor like_images(const char* name, const Tensor& t, int64_t channels) const {
    TORCH_CHECK_VALUE(t.is_cpu() && t.scalar_type() == at::kFloat && t.dim() == 4 && t.size(0) == n_ && t.size(1) == channels &&
                          t.size(2) == h_ && t.size(3) == w_,
                      name, ": expected a float32 CPU tensor [", n_, ", ", channels, ", ", h_, ", ", w_, "], got ", t.sizes());
    return resolved(t).contiguous(at::MemoryFormat::ChannelsLast);
  }
  bool tiled() const { return tiled_; }
  void forward_alone() { tiled_ = tiled_ && pays(kForward); }

  // Pieces of the rows, what follows on which is done while they are in cache.
  int64_t pieces() const { return tiled() ? bands_.count : parts_.count; }

  // The moments of a result, piece by piece.
  class Pieces {
   public:
    Pieces(const OneConvolution& owner, bool wanted)
        : owner_(owner), wanted_(wanted), mean_(wanted ? owner.pieces() * padded(owner.outputs_) : 0), m2_(mean_.size()) {}
    void take(int64_t piece, Slot<const float> rows, int64_t n) {
      const int64_t channels = owner_.outputs_, at = piece * padded(channels);
      if (wanted_ && n > 0) moments_of_rows<float>({rows, n, channels, mean_.data() + at, m2_.data() + at});
    }
    void append_to(std::vector<Tensor>& result) const {
      if (!wanted_) return;
      const Moment found(owner_.outputs_, owner_.kept_);
      float *mean = found.mean.data_ptr<float>(), *var = found.var.data_ptr<float>();
      owner_.tiled() ? merge(owner_.bands_, mean_, m2_, owner_.outputs_, mean, var)
                     : merge(owner_.parts_, mean_, m2_, owner_.outputs_, mean, var);
      result.insert(result.end(), {found.mean, found.var});
    }

   private:
    const OneConvolution& owner_;
    const bool wanted_;
    Aligned<double> mean_, m2_;
  };

  // The convolution of what `load` brings; then(piece, out, pixel, n) follows on each piece. `tiles` is the weight
  // as [16][channels][outputs], or null.
  template <typename Load, typename Then>
  Tensor convolved(const Load& load, const float* tiles, const Then& then) {
    if (!tiled() && conv_.size(2) != 1) {
      const Tensor out = convolve(conv_, channels_, materialise(channels_, load));
      parts_.run([&](int64_t part, int64_t from, int64_t to) { then(part, rows_of(out, outputs_).row(from), from, to - from); });
      return out;
    }
    const Tensor out = empty_nhwc(outputs_);
    const Slot<float> rows = rows_of(out, outputs_);
    auto follow = [&](int64_t piece, int64_t pixel, int64_t n) { then(piece, rows.row(pixel), pixel, n); };
    if (tiled()) {
      winograd(bands_, channels_, outputs_, by_rows(load, channels_), tiles ? TileWeight{tiles, false} : tile_weight(conv_, false), rows, follow);
    } else {
      product(load, rows, follow);
    }
    return out;
  }
  // The gradient of the result: rows of `outputs` that are there, or that are made of what it is computed from.
  struct Gradient {
    const float* data;
    std::function<const float*(int64_t row, int64_t n)> make{};  // of 1x1 convolutions alone

    const float* rows(int64_t row, int64_t n, int64_t outputs) const { return data ? data + row * outputs : make(row, n); }
  };
  // make(row, n, out) writes rows of it.
  Gradient made_by_rows(const RowsOfGradient& make) const {
    TORCH_CHECK_VALUE(conv_.size(2) == 1, "conv: the gradient goes by rows in 1x1 convolutions alone");
    return {nullptr, [this, &make](int64_t row, int64_t n) {
      float* out = scratch(4, n * outputs_);
      make(row, n, out);
      return out;
    }};
  }

  // The gradients of what `load` brings, where asked for, then(piece, dx, pixel, n) after each piece of it; and of the weight.
  template <typename Load, typename Then>
  std::pair<Tensor, Tensor> convolved_backward(const Gradient& grad, const Load& load, bool need_data, bool need_conv, const Then& then) {
    Tensor dx, dconv;
    if (!tiled() && conv_.size(2) != 1) {
      std::tie(dx, dconv) = convolve_backward(grad.data, outputs_, load, channels_, conv_, need_data, need_conv);
      if (need_data)
        parts_.run([&](int64_t part, int64_t from, int64_t to) { then(part, rows_of(dx, channels_).row(from), from, to - from); });
      return {dx, dconv};
    }
    if (need_data) dx = empty_nhwc(channels_);
    const Slot<float> rows = need_data ? rows_of(dx, channels_) : Slot<float>{};
    auto follow = [&](int64_t piece, int64_t pixel, int64_t n) { then(piece, rows.row(pixel), pixel, n); };
    if (!tiled()) {
      dconv = product_backward(grad, load, rows.data, need_conv, follow);
    } else {
      if (need_data) data_gradient_by_tiles(bands_, grad.data, conv_, rows, follow);
      if (need_conv) dconv = weight_gradient_by_tiles(grad.data, load, conv_);
    }
    return {dx, dconv};
  }

  static Slot<float> rows_of(const Tensor& t, int64_t channels) { return {t.data_ptr<float>(), channels}; }

  Tensor laid(const Tensor& t) const { return rkfast::laid(t, channels_last_); }

 private:
  // Few pixels do not pay for the transform of a weight, unless that is small.
  bool pays(double least) const { return narrow(channels_, outputs_) || rows_ >= least * std::max(channels_, outputs_); }

  // The right side of a product with a 1x1 weight, [rows][columns]. A large one lies in panels of kPanel columns: rows that
  // are a multiple of a page apart would fall on the same cache lines.
  struct Right {
    const float* data;
    int64_t rows, columns;
    bool panels;

    void multiply(int64_t n, Slot<const float> a, Slot<float> out) const {
      if (!panels) return at::native::cpublas::brgemm(n, columns, rows, a.pitch, columns, out.pitch, false, a.data, data, out.data);
      for (int64_t c = 0; c < columns; c += kPanel) {
        const int64_t width = std::min(kPanel, columns - c);
        at::native::cpublas::brgemm(n, width, rows, a.pitch, width, out.pitch, false, a.data, data + c * rows, out.data + c);
      }
    }
  };
  static constexpr int64_t kPanel = 64;

  static constexpr int64_t kFew = 128;  // rows, up to which a wide weight takes longer to move than to multiply

  bool wide() const { return channels_ * outputs_ >= int64_t(1) << 16; }
  // There are more parts of the weight than of the rows then, and it is read once, as it lies.
  bool few() const { return wide() && rows_ <= kFew; }

  // The weight, or where `gradient` that of the convolution that its data gradient is.
  Right right(bool gradient) {
    if (!wide()) return gradient ? Right{matrix_.const_data_ptr<float>(), outputs_, channels_, false} : Right{turned(conv_), channels_, outputs_, false};
    const int64_t rows = gradient ? outputs_ : channels_, columns = gradient ? channels_ : outputs_;
    float* panels = room<float>(turned_, rows * columns);
    const float* w = matrix_.const_data_ptr<float>();
    at::parallel_for(0, (columns + kPanel - 1) / kPanel, 1, [&](int64_t from, int64_t to) {
      for (int64_t panel = from; panel < to; ++panel) {
        const int64_t c = panel * kPanel, width = std::min(kPanel, columns - c);
        float* out = panels + c * rows;
        if (gradient) {
          for (int64_t i = 0; i < rows; ++i) std::copy_n(w + i * columns + c, width, out + i * width);
        } else {
          transpose_rows({{w + c * rows, rows}, width, rows, {out, width}});
        }
      }
    });
    return {panels, rows, columns, true};
  }

  // The 1x1 convolution as a product, tile by tile.
  template <typename Load, typename Then>
  void product(const Load& load, Slot<float> out, const Then& then) {
    if (wide()) matrix_ = as_matrix();
    if (few()) return product_of_few(load, out, then);
    const Right weight = right(false);
    parts_.run([&](int64_t part, int64_t from, int64_t to) {
      parts_.tiles(from, to, [&](int64_t i, int64_t n) { weight.multiply(n, load.here(i, n, 0), out.row(i)); });
      then(part, from, to - from);
    });
  }
  Tensor as_matrix() const { return conv_.reshape({outputs_, channels_}).contiguous(); }

  // Transposed, weight times rows.
  template <typename Load, typename Then>
  void product_of_few(const Load& load, Slot<float> out, const Then& then) {
    constexpr int64_t kOutputs = 32, kChannels = 256;
    const int64_t pitch = rows_ + kRegister - rows_ % kRegister;
    float* acts = room<float>(turned_, channels_ * pitch);
    parts_.run([&](int64_t, int64_t from, int64_t to) {
      parts_.tiles(from, to, [&](int64_t i, int64_t n) { transpose_rows({load.here(i, n, 0), n, channels_, {acts + i, pitch}}); });
    });
    const float* w = matrix_.const_data_ptr<float>();
    at::parallel_for(0, (outputs_ + kOutputs - 1) / kOutputs, 1, [&](int64_t from, int64_t to) {
      float* some = scratch(1, kOutputs * pitch);
      for (int64_t k = from * kOutputs; k < std::min(outputs_, to * kOutputs); k += kOutputs) {
        const int64_t n = std::min(kOutputs, outputs_ - k);
        for (int64_t c = 0; c < channels_; c += kChannels)
          at::native::cpublas::brgemm(n, rows_, std::min(kChannels, channels_ - c), channels_, pitch, pitch, c > 0,
                                      w + k * channels_ + c, acts + c * pitch, some);
        transpose_rows({{some, pitch}, n, rows_, {out.data + k, out.pitch}});
      }
      at::native::cpublas::brgemm_release();
    });
    parts_.run([&](int64_t part, int64_t from, int64_t to) { then(part, from, to - from); });
  }
  void data_gradient_of_few(const float* grad, float* dx) const {
    constexpr int64_t kOutputs = 128, kChannels = 128;
    const float* w = matrix_.const_data_ptr<float>();
    at::parallel_for(0, (channels_ + kChannels - 1) / kChannels, 1, [&](int64_t from, int64_t to) {
      for (int64_t c = from * kChannels; c < std::min(channels_, to * kChannels); c += kChannels)
        for (int64_t k = 0; k < outputs_; k += kOutputs)
          at::native::cpublas::brgemm(rows_, std::min(kChannels, channels_ - c), std::min(kOutputs, outputs_ - k), outputs_,
                                      channels_, channels_, k > 0, grad + k, w + k * channels_ + c, dx + c);
      at::native::cpublas::brgemm_release();
    });
  }

  // The gradient of what was multiplied into dx, unless that is null, and that of the weight.
  template <typename Load, typename Then>
  Tensor product_backward(const Gradient& grad, const Load& load, float* dx, bool need_conv, const Then& then) {
    matrix_ = as_matrix();
    if (few()) {
      const Gradient all{grad.rows(0, rows_, outputs_)};
      if (dx) {
        data_gradient_of_few(all.data, dx);
        parts_.run([&](int64_t part, int64_t from, int64_t to) { then(part, from, to - from); });
      }
      return need_conv ? by_outputs(all, load, [](int64_t, int64_t, int64_t, const float*) {}) : Tensor();
    }
    const Right weight = dx ? right(true) : Right{};
    auto data_gradient = [&](int64_t part, int64_t i, int64_t n, const float* g) {
      if (!dx) return;
      weight.multiply(n, {g, outputs_}, {dx + i * channels_, channels_});
      then(part, i, n);
    };
    if (need_conv && wide()) return by_outputs(grad, load, data_gradient);
    const int64_t tile = parts_.tile, size = outputs_ * channels_;
    const Tensor partial = at::empty({parts_.count, need_conv ? size : 0}, options_);
    float* products = partial.data_ptr<float>();
    parts_.run([&](int64_t part, int64_t from, int64_t to) {
      float* turned = scratch(0, tile * outputs_);
      if (need_conv && from == to) std::fill_n(products + part * size, size, 0.f);
      parts_.tiles(from, to, [&](int64_t i, int64_t n) {
        const float* g = grad.rows(i, n, outputs_);
        if (need_conv) {
          transpose_rows({{g, outputs_}, n, outputs_, {turned, tile}});
          const Slot<const float> act = load.here(i, n, 1);
          at::native::cpublas::brgemm(outputs_, channels_, n, tile, act.pitch, channels_, i != from, turned, act.data,
                                      products + part * size);
        }
        data_gradient(part, i, n, g);
      });
    });
    return need_conv ? lying_like(partial.sum(0).reshape(conv_.sizes()), conv_) : Tensor();
  }
  // The gradient of a wide weight: no partial sums, but a product for each block of it, over as many rows as a buffer takes.
  // data_gradient(part, pixel, n, gradient) does the other on the way.
  template <typename Load, typename Other>
  Tensor by_outputs(const Gradient& grad, const Load& load, const Other& data_gradient) {
    constexpr int64_t kBuffer = 1 << 20, kRows = 128, kOutputs = 64, kChannels = 256;
    const Tensor out = at::empty({outputs_, channels_}, options_);
    float* dw = out.data_ptr<float>();
    const int64_t most = std::max<int64_t>(1, kBuffer / std::max(outputs_, channels_) / parts_.each);  // parts at a time
    // Transposed, so many rows lie together: those of all would be on a page each.
    const int64_t ahead = std::min(rows_, most * parts_.each), pitch = kRows + kRegister, act_pitch = channels_ + kPad;
    const int64_t together = outputs_ * pitch, size = (ahead + kRows - 1) / kRows * together;
    float *turned = scratch(6, size + Load::kMade * ahead * act_pitch), *acts = turned + size;
    auto turn = [&](int64_t row, int64_t n, const float* g) {
      for (const int64_t end = row + n; row < end;) {
        const int64_t first = row % kRows, some = std::min(end - row, kRows - first);
        transpose_rows({{g, outputs_}, some, outputs_, {turned + row / kRows * together + first, pitch}});
        g += some * outputs_;
        row += some;
      }
    };
    const int64_t wide = (channels_ + kChannels - 1) / kChannels, blocks = (outputs_ + kOutputs - 1) / kOutputs * wide;
    for (int64_t first = 0; first < parts_.count; first += most) {
      const int64_t begin = parts_.begin(first), end = parts_.begin(std::min(parts_.count, first + most));
      at::parallel_for(first, std::min(parts_.count, first + most), 1, [&](int64_t from, int64_t to) {
        for (int64_t part = from; part < to; ++part)
          parts_.tiles(parts_.begin(part), parts_.begin(part + 1), [&](int64_t i, int64_t n) {
            const float* g = grad.rows(i, n, outputs_);
            turn(i - begin, n, g);
            if constexpr (Load::kMade) load(i, n, {acts + (i - begin) * act_pitch, act_pitch});
            data_gradient(part, i, n, g);
          });
        at::native::cpublas::brgemm_release();
      });
      const Slot<const float> act = Load::kMade ? Slot<const float>{acts, act_pitch} : load.here(begin, end - begin, 0);
      at::parallel_for(0, blocks, 1, [&](int64_t from, int64_t to) {
        for (int64_t block = from; block < to; ++block) {
          const int64_t k = block / wide * kOutputs, c = block % wide * kChannels;
          for (int64_t i = 0; i < end - begin; i += kRows)
            at::native::cpublas::brgemm(std::min(kOutputs, outputs_ - k), std::min(kChannels, channels_ - c),
                                        std::min(kRows, end - begin - i), pitch, act.pitch, channels_, first > 0 || i > 0,
                                        turned + i / kRows * together + k * pitch, act.row(i).data + c, dw + k * channels_ + c);
        }
        at::native::cpublas::brgemm_release();
      });
    }
    return lying_like(out.view(conv_.sizes()), conv_);
  }

  Tensor matrix_;

 protected:
  const int64_t channels_, outputs_;
  const Bands bands_;
  const bool channels_last_;
  const Tensor given_, conv_;
  bool tiled_ = false;
  Tensor kept_;
  Slot<const float> x_;
};

}  // namespace rkfast
