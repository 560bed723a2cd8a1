// Between tensors and kernels: shapes, operands, and vectors per channel in the type and padding that the kernels read.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/MemoryFormat.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/strides.h>

#include <algorithm>
#include <functional>
#include <optional>
#include <vector>

#include "common/layout.h"
#include "cpu/aligned.h"
#include "cpu/kernels.h"

namespace rkfast {

using at::Tensor;
using Optional = std::optional<Tensor>;

// Inside an op autocast is over, its copies and conversions mean what they say, and none of them is recorded.
struct WithinOp {
  c10::impl::ExcludeDispatchKeyGuard without_autocast{c10::autocast_dispatch_keyset};
  at::NoGradGuard without_gradients;
};

inline DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat: return DType::kFloat;
    case at::kDouble: return DType::kDouble;
    case at::kBFloat16: return DType::kBFloat16;
    default:
      TORCH_CHECK_TYPE(x.scalar_type() == at::kHalf, "rkfast: no CPU kernel for dtype ", x.scalar_type());
      return DType::kHalf;
  }
}

constexpr int64_t kUnit = 16384;  // elements per unit of work

inline void set_unit(Shape& s) {
  // A unit is long enough for its sums to be worth merging, and there are not many of them to a channel.
  const int64_t fill = (kUnit + s.length - 1) / std::max<int64_t>(s.length, 1);
  s.unit = s.channels_last ? std::max({fill, int64_t(16), (s.inner + 63) / 64}) : std::max<int64_t>(fill, 1);
  s.unit = std::min(s.unit, s.inner);
}

// `by_sample`: something differs from sample to sample, so that samples cannot be walked as one.
inline Shape shape_of(const Rows& r, bool by_sample) {
  Shape s{};
  s.channels_last = r.channels_last;
  s.outer = r.outer();
  s.inner = r.inner();
  s.length = s.last = r.length();
  s.replicas = 1;
  if (r.channels_last && !by_sample) {
    s.inner *= s.outer;
    s.outer = 1;
  }
  set_unit(s);
  return s;
}

// Joins dense channels_last rows of few channels, so that registers are full; returns how many go into one.
inline int64_t join_rows(Shape& s, bool dense) {
  if (!s.channels_last || !dense) return 1;
  int64_t join = 1;
  while (s.length * join < kJoined && s.inner % (2 * join) == 0 && s.inner > 0) join *= 2;
  s.length *= join;
  s.last = s.length;
  s.inner /= join;
  s.replicas = join;
  set_unit(s);
  return join;
}

// Everything dense and nothing per channel: rows are cut where it suits the cache.
inline Shape flat_shape(int64_t numel) {
  Shape s{};
  s.outer = s.replicas = 1;
  s.length = std::min<int64_t>(std::max<int64_t>(numel, 1), kUnit);
  s.inner = (numel + s.length - 1) / s.length;
  s.last = numel - (s.inner - 1) * s.length;
  s.unit = std::min<int64_t>(s.inner, 1);
  return s;
}

// Whether a call that touches so many tensors like x leaves nothing of their beginnings in the last cache. Its results
// are then written past the caches, which saves reading what is overwritten. What the system says of the cache's size is
// no guide: it may be the sum over sockets.
inline bool outgrows_cache(const Tensor& x, int64_t tensors) {
  constexpr int64_t kLastCache = int64_t(32) << 20;
  return static_cast<int64_t>(x.nbytes()) * tensors > kLastCache;
}

inline bool is_dense(int64_t outer, int64_t inner, const Rows& r) {
  return inner == r.length() && (r.outer() <= 1 || outer == r.inner() * r.length());
}

// x with its values in memory; without the dispatcher where they are.
inline Tensor resolved(const Tensor& x) { return x.is_neg() ? x.resolve_neg() : x; }

// Conforming operands stay alive here while a kernel runs. All have the shape, dtype and device of the first.
class Operands {
 public:
  Operands(const Tensor& first, const Rows& r) : first_(first), rows_(r) {}

  Operand add(const Tensor& x) {
    check(x);
    Pitch p;
    kept_.push_back(conform(resolved(x), rows_, p));
    dense_ = dense_ && is_dense(p.outer, p.inner, rows_);
    return {kept_.back().const_data_ptr(), p.outer, p.inner};
  }

  // A tensor that is written: it is never copied.
  Operand output(const Tensor& x) {
    check(x);
    Pitch p;
    TORCH_CHECK_VALUE(!x.is_neg(), "out: a view that negates lazily cannot be written");
    TORCH_CHECK_VALUE(find_pitch(x, rows_, p), "out: neither dense nor a channel slice in the layout of the call");
    dense_ = dense_ && is_dense(p.outer, p.inner, rows_);
    return {x.data_ptr(), p.outer, p.inner};
  }

  bool all_dense() const { return dense_; }

  // Bits of a kept mask.
  uint8_t* mask(const Tensor& m) const {
    TORCH_CHECK_VALUE(m.scalar_type() == at::kByte && m.is_cpu() && m.is_contiguous() &&
                          m.numel() == rows_.outer() * rows_.inner() * mask_bytes(rows_),
                      "mask: expected contiguous uint8 [rows, ceil(length / 8)] of this call, got ", m.sizes());
    return const_cast<uint8_t*>(m.const_data_ptr<uint8_t>());
  }

 private:
  void check(const Tensor& x) const {
    TORCH_CHECK_VALUE(x.is_cpu() && x.scalar_type() == first_.scalar_type() && x.sizes() == first_.sizes(),
                      "expected CPU tensors of one shape and dtype, got ", x.sizes(), " beside ", first_.sizes());
  }

  const Tensor& first_;
  const Rows& rows_;
  bool dense_ = true;
  std::vector<Tensor> kept_;
};

inline void flatten(Operand& x, const Shape& s) { x.outer = 0, x.inner = s.length; }

// A vector [C], or, where there are samples, [N, C]; read in double whatever its type.
class Vector {
 public:
  Vector(const char* name, const Optional& v, int64_t channels, double otherwise, int64_t samples = -1)
      : channels_(channels), otherwise_(otherwise) {
    if (!v) return;
    by_sample_ = v->dim() == 2;
    TORCH_CHECK_VALUE(v->is_cpu(), name, ": expected a CPU tensor, got one on ", v->device());
    TORCH_CHECK_TYPE(at::isFloatingType(v->scalar_type()), name, ": expected a floating-point tensor, got ",
                     v->scalar_type());
    TORCH_CHECK_VALUE(v->dim() >= 1 && v->dim() <= 2 && v->size(-1) == channels &&
                          (!by_sample_ || v->size(0) == samples),
                      name, ": expected one value per channel, [", channels, "]",
                      samples < 0 ? "" : " or one per sample and channel", ", got ", v->sizes());
    const Tensor values = resolved(*v);
    if (values.scalar_type() == at::kFloat && values.is_contiguous()) {
      kept_ = values;
      float_ = kept_.const_data_ptr<float>();
    } else {
      kept_ = values.to(at::kDouble).contiguous();
      double_ = kept_.const_data_ptr<double>();
    }
  }
  bool by_sample() const { return by_sample_; }
  double at(int64_t n, int64_t c) const {
    const int64_t i = by_sample_ ? n * channels_ + c : c;
    return float_ ? float_[i] : double_ ? double_[i] : otherwise_;
  }

 private:
  int64_t channels_;
  double otherwise_;
  bool by_sample_ = false;
  Tensor kept_;
  const float* float_ = nullptr;
  const double* double_ = nullptr;
};

// Vectors for the kernels, [samples or 1][padded] in float or double.
class Vectors {
 public:
  Vectors(const Shape& s, at::ScalarType dtype)
      : padded_(s.padded()), columns_(s.columns()), channels_(s.channels()), wide_(dtype == at::kDouble) {}

  template <typename F>
  Factor add(int64_t samples, F&& value) {
    if (wide_) return fill<double>(doubles_.emplace_back(samples * padded_), samples, value);
    return fill<float>(floats_.emplace_back(samples * padded_), samples, value);
  }

 private:
  template <typename T, typename F>
  Factor fill(Aligned<T>& to, int64_t samples, F&& value) {
    for (int64_t n = 0; n < samples; ++n)
      for (int64_t i = 0; i < columns_; ++i)
        to[n * padded_ + i] = i < channels_ ? static_cast<T>(value(n, i)) : to[n * padded_ + i - channels_];
    return {to.data(), samples > 1 ? padded_ : 0, 1};
  }

  int64_t padded_, columns_, channels_;
  bool wide_;
  std::vector<Aligned<float>> floats_;
  std::vector<Aligned<double>> doubles_;
};

// What the units of a reduction leave behind, merged in a fixed order.
class Partials {
 public:
  Partials(const Shape& s, int64_t vectors)
      : s_(s), vectors_(vectors), data_(new double[std::max<int64_t>(1, vectors * s.partials() * s.padded())]) {}

  double* data() { return data_.get(); }
  double* vector(int64_t which) { return data() + which * s_.partials() * s_.padded(); }
  Moments moments() { return {vector(0), vector(1)}; }

  void clear() { std::fill_n(data(), vectors_ * s_.partials() * s_.padded(), 0.0); }

  // [C] mean and variance from moments().
  std::pair<Tensor, Tensor> merge_moments(const Tensor& x);

  // Sum number `which` over each channel, [C], or over each channel of each sample, [N][C].
  std::vector<double> sums(int64_t which, bool by_sample);

 private:
  Shape s_;
  int64_t vectors_;
  std::unique_ptr<double[]> data_;
};

inline void store(Tensor& v, int64_t i, double value) {
  if (v.scalar_type() == at::kDouble) {
    v.mutable_data_ptr<double>()[i] = value;
  } else {
    v.mutable_data_ptr<float>()[i] = static_cast<float>(value);
  }
}

inline Tensor empty_vector(const Tensor& x, at::IntArrayRef sizes) {
  return at::empty(sizes, x.options().dtype(moments_dtype(x.scalar_type())).memory_format(at::MemoryFormat::Contiguous));
}

// channel_moments of what is an operand already.
std::pair<Tensor, Tensor> own_moments(const Tensor& x, Operand operand, const Rows& rows, bool dense);

// Images in one layout or the other, with the strides that the fake kernels say.
inline Tensor laid(const Tensor& t, bool channels_last) {
  const std::vector<int64_t> strides =
      channels_last ? c10::get_channels_last_strides_2d(t.sizes()) : at::IntArrayRef(c10::contiguous_strides(t.sizes())).vec();
  return t.strides() == at::IntArrayRef(strides) ? t : at::empty_strided(t.sizes(), strides, t.options()).copy_(t);
}

// Whether what PyTorch's convolution reads and writes, so many elements, had best lie contiguous as a larger weight does: in
// channels_last the weight would be copied, at each call and for each gradient.
inline bool follows(const Tensor& w, int64_t elements) {
  return elements < w.numel() && w.is_contiguous() && !w.is_contiguous(at::MemoryFormat::ChannelsLast);
}

// A gradient that nobody else holds, laid out as what it is of: a copy where it is not yet.
inline Tensor lying_like(const Tensor& gradient, const Tensor& w) {
  bool same = w.is_non_overlapping_and_dense();
  for (int64_t i = 0; i < w.dim(); ++i) same = same && (w.size(i) == 1 || gradient.stride(i) == w.stride(i));
  return same ? gradient.as_strided(w.sizes(), w.strides()) : at::empty_like(w).copy_(gradient);
}

// The height or width of what a convolution that pads by half its size makes.
inline int64_t reduced(int64_t size, int64_t stride) { return size == 0 ? 0 : (size - 1) / stride + 1; }

// What Python asks before it calls an op, answered in one go: bits of
enum Survey : int64_t {
  kUniform = 1,       // tensors an op takes, of one shape, dtype and device, and vectors that fit them
  kChannelsLast = 2,  // the layout of the first
  kNeedsGrad = 4,     // grad mode is on and one of them requires grad
  kPlain = 8,         // nobody watches the dispatcher: no mode, subclass, transform, tracer, profiler or dual level
};
int64_t survey(const std::vector<Optional>& tensors, const std::vector<Optional>& vectors,
               const std::vector<Optional>& gates,  // [C]; [C] or [N, C]
               int64_t running,                     // so many of the vectors, the last ones, are written
               const Optional& counter);            // as is this integer
// The same of a residual block, its statistics, where there are any, being written.
int64_t survey_block(const Tensor& x, const Optional& shortcut, const std::vector<Tensor>& convs,
                     const std::vector<Optional>& norms,  // weight, bias, running mean and variance, and counter of each
                     const Optional& step, const std::vector<int64_t>& strides);
// And of the growths of a dense block, that read so many channels; norms in the order of the growths; moments of x.
int64_t survey_growths(const Tensor& x, const std::vector<Tensor>& conv1, const std::vector<Tensor>& conv2,
                       const std::vector<int64_t>& widths, const std::vector<Optional>& norms, const Optional& mean,
                       const Optional& var);

// The functions that Python sees: what each returns stands in rkfast/ops/<op>/__init__.py.
std::vector<Tensor> rk_sum(const std::vector<Tensor>& terms, const std::vector<double>& coeffs,
                           const std::vector<Optional>& steps, const Optional& shift, bool channels_last, bool relu,
                           bool moments, bool mask, const Optional& out);
std::vector<Tensor> rk_sum_backward(const Tensor& grad, const Optional& mask, const std::vector<double>& coeffs,
                                    const std::vector<Optional>& steps, const std::vector<Tensor>& step_terms,
                                    const std::vector<double>& step_coeffs, const std::vector<bool>& per_sample,
                                    bool shift, bool channels_last);
std::vector<Tensor> bn_rk_sum(const Tensor& x, const Optional& weight, const Optional& bias, const Optional& mean,
                              const Optional& var, const std::vector<Tensor>& terms, const std::vector<double>& coeffs,
                              const Optional& step, bool channels_last, bool relu, double eps, bool moments, bool mask,
                              const Optional& out);
std::vector<Tensor> bn_rk_sum_backward(const Tensor& grad, const Tensor& x, const Optional& weight,
                                       const Optional& bias, const Tensor& mean, const Tensor& var,
                                       const Optional& step, const Optional& mask, const std::vector<double>& coeffs,
                                       bool channels_last, bool relu, bool batch_stats, double eps, bool need_x,
                                       bool need_affine, bool need_step);
std::pair<Tensor, Tensor> channel_moments(const Tensor& x, bool channels_last);
void update_running_stats(const Tensor& mean, const Tensor& var, int64_t count, const std::vector<Tensor>& running_mean,
                          const std::vector<Tensor>& running_var, const std::vector<Tensor>& num_batches_tracked,
                          std::optional<double> momentum);
std::vector<Tensor> dense_block(const Tensor& x, const std::vector<Tensor>& conv1, const std::vector<Tensor>& conv2,
                                const std::vector<Optional>& norms, const std::vector<Optional>& keeps, double keep_scale,
                                const std::vector<int64_t>& reads, const std::vector<int64_t>& writes,
                                const std::vector<double>& eps, int64_t channels, const std::vector<int64_t>& summed,
                                const Optional& mean, const Optional& var, bool keep, bool total_moments);
std::vector<Tensor> dense_block_backward(const Tensor& grad, const Tensor& buffer, const Tensor& mean, const Tensor& var,
                                         const std::vector<Tensor>& mid_moments, const std::vector<Tensor>& mids,
                                         const std::vector<Tensor>& conv1, const std::vector<Tensor>& conv2,
                                         const std::vector<Optional>& norms, const std::vector<Optional>& keeps,
                                         double keep_scale, const std::vector<int64_t>& reads,
                                         const std::vector<int64_t>& writes, const std::vector<double>& eps,
                                         int64_t inputs, const std::vector<int64_t>& summed);
Tensor bn_relu_pool(const Tensor& x, const Optional& weight, const Optional& bias, const Tensor& mean, const Tensor& var,
                    bool channels_last, double eps);
std::vector<Tensor> bn_relu_pool_backward(const Tensor& grad, const Tensor& x, const Optional& weight, const Optional& bias,
                                          const Tensor& mean, const Tensor& var, bool channels_last, bool batch_stats, double eps,
                                          bool need_x, bool need_affine);
std::vector<Tensor> bn_relu_conv(const Tensor& x, const Tensor& conv, const Optional& weight, const Optional& bias,
                                 const Optional& mean, const Optional& var, bool channels_last, double eps,
                                 bool moments);
std::vector<Tensor> bn_relu_conv_backward(const Tensor& grad, const Tensor& x, const Tensor& conv, const Optional& weight,
                                          const Optional& bias, const Tensor& mean, const Tensor& var, bool channels_last,
                                          bool batch_stats, double eps, bool need_x, bool need_conv, bool need_affine);

std::vector<Tensor> conv(const Tensor& x, const Tensor& weight, const Optional& bias, const Optional& other, bool channels_last,
                         bool relu, bool moments);
std::vector<Tensor> conv_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, const Optional& other,
                                  bool channels_last, bool need_x, bool need_weight);
std::vector<Tensor> residual_block(const Tensor& x, const Optional& shortcut, const std::vector<Tensor>& convs,
                                   const std::vector<Optional>& norms, const Optional& step, const std::vector<int64_t>& strides,
                                   const std::vector<double>& eps, bool channels_last, bool keep);
std::vector<Tensor> residual_block_backward(const Tensor& grad, const Tensor& x, const std::vector<Tensor>& outs,
                                            const Tensor& mask, const std::vector<Tensor>& convs,
                                            const std::vector<Optional>& norms, const Optional& step,
                                            const std::vector<int64_t>& strides, const std::vector<double>& eps,
                                            const std::vector<bool>& batch,
                                            bool channels_last, bool own, bool need_x, bool need_shortcut, bool need_convs,
                                            bool need_step);
// The backward of a 1x1 convolution, channels_last, whose gradient is made as it is read, each row once: grad(first, n, out)
// writes n of them. Of bn_relu_conv for all of its inputs.
using RowsOfGradient = std::function<void(int64_t first, int64_t n, float* out)>;
std::vector<Tensor> conv_backward(const RowsOfGradient& grad, const Tensor& x, const Tensor& weight, bool need_x, bool need_weight);
std::vector<Tensor> bn_relu_conv_backward(const RowsOfGradient& grad, const Tensor& x, const Tensor& conv, const Optional& weight,
                                          const Optional& bias, const Tensor& mean, const Tensor& var, bool batch_stats,
                                          double eps, bool need_conv);

}  // namespace rkfast
