#include "cpu/bn_rk_sum.h"

#include <ATen/Parallel.h>

namespace rkfast {
namespace {

class BnReluPool {
 public:
  BnReluPool(const Tensor& x, const Optional& weight, const Optional& bias, const Tensor& mean, const Tensor& var, bool channels_last,
             double eps)
      : x_(checked(x)), n_(x.size(0)), channels_(x.size(1)), h_(x.size(2)), w_(x.size(3)), channels_last_(channels_last), rows_(x, true),
        norm_(rows_, weight, bias, mean, var, {}, eps), operands_(x_, rows_), input_(operands_.add(x_)), shape_(shape_of(rows_, false)),
        vectors_(shape_, moments_dtype(x.scalar_type())) {
    const Folded folded = norm_.fold(vectors_);
    scale_ = folded.scale.vector;
    center_ = folded.center.vector;
    shift_ = vectors_.add(1, [&](int64_t, int64_t c) { return norm_.bias(c); }).vector;
  }

  Tensor forward() const {
    const Tensor out = images(h_ / 2, w_ / 2);
    const int64_t size = w_ / 2 * channels_;
    at::parallel_for(0, n_ * (h_ / 2), std::max<int64_t>(1, kUnit / std::max<int64_t>(4 * size, 1)), [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i)
        pool_rows({dtype_of(x_), pixels(i / (h_ / 2), 2 * (i % (h_ / 2))), w_ * input_.inner, input_.inner, w_ / 2, channels_, scale_, shift_,
                   center_, address(out, i * size)});
    });
    return laid(out, channels_last_);
  }

  std::vector<Tensor> backward(const Tensor& gradient, bool batch_stats, bool need_x, bool need_affine) {
    TORCH_CHECK_VALUE(gradient.is_cpu() && gradient.scalar_type() == x_.scalar_type() && gradient.dim() == 4 && gradient.size(0) == n_ &&
                          gradient.size(1) == channels_ && gradient.size(2) == h_ / 2 && gradient.size(3) == w_ / 2,
                      "grad: expected a ", x_.scalar_type(), " CPU tensor [", n_, ", ", channels_, ", ", h_ / 2, ", ", w_ / 2, "], got ",
                      gradient.sizes());
    Pitch pitch;
    const Tensor grad = conform(resolved(gradient), Rows(gradient, true), pitch);
    PoolRowsBackward a{};
    a.dtype = dtype_of(x_);
    a.row = w_ * input_.inner;
    a.pixel = input_.inner;
    a.grad_pixel = pitch.inner;
    a.columns = w_ / 2;
    a.width = w_;
    a.channels = channels_;
    a.scale = scale_;
    a.shift = shift_;
    a.center = center_;
    auto incoming = [&](int64_t i) { return address(grad, i * a.columns * pitch.inner); };  // of a row of the result

    std::vector<double> s0(channels_), s1(channels_);
    if (need_affine || (need_x && batch_stats)) {
      // Parts whose number depends on the shape alone, so that no sum depends on the threads.
      constexpr int64_t kParts = 64;
      const int64_t padded = shape_.padded(), rows = n_ * (h_ / 2), parts = std::clamp<int64_t>(rows / 2, 1, kParts);
      Aligned<double> sums(2 * parts * padded);
      at::parallel_for(0, parts, 1, [&](int64_t from, int64_t to) {
        Aligned<double> row_sums(2 * padded);
        for (int64_t part = from; part < to; ++part) {
          PoolRowsBackward some = a;
          some.rows = 2;
          some.sums[0] = sums.data() + 2 * part * padded;
          some.sums[1] = some.sums[0] + padded;
          some.row_sums = row_sums.data();
          for (int64_t i = part * rows / parts; i < (part + 1) * rows / parts; ++i) {
            some.x = pixels(i / (h_ / 2), 2 * (i % (h_ / 2)));
            some.grad = incoming(i);
            pool_rows_backward(some);
          }
        }
      });
      for (int64_t part = 0; part < parts; ++part)
        for (int64_t c = 0; c < channels_; ++c) {
          s0[c] += sums[2 * part * padded + c];
          s1[c] += sums[(2 * part + 1) * padded + c];
        }
      for (int64_t c = 0; c < channels_; ++c) s1[c] *= norm_.rstd(c);
    }

    std::vector<Tensor> result;
    if (need_x) {
      const Tensor dx = images(h_, w_);
      if (batch_stats) {
        const double count = static_cast<double>(rows_.count());
        auto correction = [&](int64_t c) { return correct(norm_.rstd(c), norm_.weight(c), s0[c], s1[c], count); };
        a.slope = vectors_.add(1, [&](int64_t, int64_t c) { return correction(c).slope; }).vector;
        a.offset = vectors_.add(1, [&](int64_t, int64_t c) { return correction(c).offset; }).vector;
      }
      a.stream = outgrows_cache(x_, 2);
      const int64_t pairs = (h_ + 1) / 2;
      at::parallel_for(0, n_ * pairs, std::max<int64_t>(1, kUnit / std::max<int64_t>(2 * w_ * channels_, 1)), [&](int64_t from, int64_t to) {
        for (int64_t i = from; i < to; ++i) {
          const int64_t n = i / pairs, row = 2 * (i % pairs);
          PoolRowsBackward some = a;
          some.rows = std::min<int64_t>(2, h_ - row);
          some.x = pixels(n, row);
          some.grad = some.rows == 2 ? incoming(n * (h_ / 2) + row / 2) : nullptr;
          some.dx = address(dx, (n * h_ + row) * w_ * channels_);
          pool_rows_backward(some);
        }
      });
      result.push_back(laid(dx, channels_last_));
    }
    if (need_affine) {
      Tensor dweight = empty_vector(x_, {channels_}), dbias = empty_vector(x_, {channels_});
      for (int64_t c = 0; c < channels_; ++c) {
        store(dweight, c, s1[c]);
        store(dbias, c, s0[c]);
      }
      result.insert(result.end(), {dweight, dbias});
    }
    return result;
  }

 private:
  static const Tensor& checked(const Tensor& x) {
    TORCH_CHECK_VALUE(x.is_cpu() && x.dim() == 4 && x.size(2) >= 2 && x.size(3) >= 2, "x: expected a CPU tensor [N, C, H, W] of at least 2x2 pixels");
    return x;
  }
  Tensor images(int64_t height, int64_t width) const {
    return at::empty({n_, channels_, height, width}, x_.options().memory_format(at::MemoryFormat::ChannelsLast));
  }
  void* address(const Tensor& t, int64_t element) const { return static_cast<char*>(const_cast<void*>(t.const_data_ptr())) + element * x_.element_size(); }
  // The first pixel of a row.
  const void* pixels(int64_t n, int64_t row) const {
    return static_cast<const char*>(input_.data) + (n * h_ + row) * w_ * input_.inner * x_.element_size();
  }

  const Tensor x_;
  const int64_t n_, channels_, h_, w_;
  const bool channels_last_;
  const Rows rows_;
  const ScaledNorm norm_;
  Operands operands_;
  const Operand input_;
  const Shape shape_;
  Vectors vectors_;
  const void *scale_, *shift_, *center_;
};

}  // namespace

Tensor bn_relu_pool(const Tensor& x, const Optional& weight, const Optional& bias, const Tensor& mean, const Tensor& var,
                    bool channels_last, double eps) {
  WithinOp within;
  return BnReluPool(x, weight, bias, mean, var, channels_last, eps).forward();
}

std::vector<Tensor> bn_relu_pool_backward(const Tensor& grad, const Tensor& x, const Optional& weight, const Optional& bias,
                                          const Tensor& mean, const Tensor& var, bool channels_last, bool batch_stats, double eps,
                                          bool need_x, bool need_affine) {
  WithinOp within;
  return BnReluPool(x, weight, bias, mean, var, channels_last, eps).backward(grad, batch_stats, need_x, need_affine);
}

}  // namespace rkfast
