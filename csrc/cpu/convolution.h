// Convolutions that read relu(BN(x)) of channels_last images: what ops with one in them share. Nothing normalised outlives a
// call; 3x3 convolutions go by tiles where these win, the others to ATen. For host code.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <vector>

#include "common/arithmetic.h"
#include "cpu/host.h"
#include "cpu/slots.h"
#include "cpu/winograd.h"

namespace rkfast {

constexpr int64_t kRegister = 16;
constexpr int64_t kTile = 64;  // rows that are normalised into the cache and multiplied from there

inline int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

using Floats = Aligned<float>;

// The rows in a number of parts that depends on their number alone, so that no sum depends on the threads.
struct Parts {
  int64_t rows, count, each, tile;

  explicit Parts(int64_t rows) : rows(rows), count(1) {
    while (count < 32 && rows / count >= 256) count *= 2;
    if (count == 1 && rows >= 2 * kTile) count = 2;
    each = whole(std::max<int64_t>(1, (rows + count - 1) / count));
    count = std::max<int64_t>(1, (rows + each - 1) / each);
    const int64_t tiles = (each + kTile - 1) / kTile;
    tile = whole((each + tiles - 1) / tiles);
  }
  // Up to registers full of rows, which is how they are transposed.
  static int64_t whole(int64_t n) { return n < kRegister ? n : (n + kRegister - 1) / kRegister * kRegister; }
  int64_t begin(int64_t part) const { return std::min(rows, part * each); }
  int64_t size(int64_t part) const { return begin(part + 1) - begin(part); }

  // body(part, begin, end)
  template <typename Body>
  void run(Body&& body) const {
    at::parallel_for(0, count, 1, [&](int64_t from, int64_t to) {
      for (int64_t part = from; part < to; ++part) body(part, begin(part), begin(part + 1));
      at::native::cpublas::brgemm_release();
    });
  }
  // body(first, n) over the tiles of a part
  template <typename Body>
  void tiles(int64_t from, int64_t to, Body&& body) const {
    for (int64_t i = from; i < to; i += tile) body(i, std::min(tile, to - i));
  }
};

// BN as relu reads it: scale * x + shift, with what its gradient needs.
struct Read {
  Floats scale, shift, center;
  std::vector<double> scales, rstd;  // of channels, not rounded
  bool batch = false;                // statistics of the batch

  Read(int64_t channels) : scale(padded(channels)), shift(scale.size()), center(scale.size()), scales(channels), rstd(channels) {}
};

class Moment {  // of some channels, in float as they are kept
 public:
  Moment() = default;
  Moment(int64_t channels, const Tensor& like)
      : mean(at::empty({channels}, like.options().dtype(at::kFloat))), var(at::empty({channels}, mean.options())) {}
  Tensor mean, var;
};

// Moments of parts or bands, merged in order.
template <typename Pieces>
void merge(const Pieces& parts, const Aligned<double>& mean, const Aligned<double>& m2, int64_t channels,
           float* mean_out, float* var_out) {
  for (int64_t c = 0; c < channels; ++c) {
    Welford<double> all;
    for (int64_t p = 0; p < parts.count; ++p)
      all.merge(static_cast<double>(parts.size(p)), mean[p * padded(channels) + c], m2[p * padded(channels) + c]);
    mean_out[c] = static_cast<float>(all.mean);
    var_out[c] = static_cast<float>(all.variance());
  }
}

inline Optional vector(const char* name, const Optional& v, int64_t channels) {
  if (!v) return v;
  TORCH_CHECK_VALUE(v->is_cpu() && v->numel() == channels, name, ": expected ", channels, " values on the CPU, got ", v->sizes());
  return v->to(at::kFloat).contiguous();
}
inline const float* data(const Optional& v) { return v ? v->const_data_ptr<float>() : nullptr; }

// `batch` calls back with (moments, first, n) for each range of channels, where the norm has no statistics of its own.
template <typename Batch>
Read fold(const Optional* norm, int64_t channels, double eps, Batch&& batch) {
  Read r(channels);
  r.batch = !norm[2];
  const float *weight = data(norm[0]), *bias = data(norm[1]);
  int64_t c = 0;
  auto add = [&](const Moment& m, int64_t first, int64_t n) {
    const float *mean = m.mean.const_data_ptr<float>() + first, *var = m.var.const_data_ptr<float>() + first;
    for (int64_t k = 0; k < n; ++k, ++c) {
      r.rstd[c] = inverse_std(static_cast<double>(var[k]), eps);
      r.scales[c] = (weight ? weight[c] : 1.0) * r.rstd[c];
      r.scale[c] = static_cast<float>(r.scales[c]);
      r.shift[c] = static_cast<float>((bias ? bias[c] : 0.0) - mean[k] * r.scales[c]);
      r.center[c] = mean[k];
    }
  };
  if (r.batch) {
    batch(add);
  } else {
    Moment own;
    own.mean = *norm[2];
    own.var = *norm[3];
    add(own, 0, channels);
  }
  return r;
}

// Whether a weight lies as [n][m][channels][outputs], as the products read it; rkfast.fold lays it so.
inline bool outputs_last(const Tensor& w) {
  const int64_t matrix = w.size(0) * w.size(1);
  return w.stride(0) == 1 && w.stride(1) == w.size(0) && (w.size(3) == 1 || w.stride(3) == matrix) &&
         (w.size(2) == 1 || w.stride(2) == w.size(3) * matrix);
}

inline int64_t even(int64_t n) { return n + n % 2; }

// c [m, n] = or += a [m, k] b, the right side as Convolutions<T>::turned or pair_rows leave it. k is even in bfloat16.
inline void product(int64_t m, int64_t n, int64_t k, const float* a, int64_t a_pitch, const float* b, float* c, int64_t c_pitch, bool add = false) {
  at::native::cpublas::brgemm(m, n, k, a_pitch, n, c_pitch, add, a, b, c);
}
inline void product(int64_t m, int64_t n, int64_t k, const at::BFloat16* a, int64_t a_pitch, const at::BFloat16* b, float* c, int64_t c_pitch, bool add = false) {
  at::native::cpublas::brgemm(m, n, k, a_pitch, n, c_pitch, add, a, b, c);
}

// body(T{}) for what Convolutions<T> are written for.
template <typename Body>
auto with_type(const Tensor& x, const char* name, Body&& body) {
  if (x.scalar_type() == at::kBFloat16) return body(at::BFloat16());
  TORCH_CHECK_VALUE(x.scalar_type() == at::kFloat, name, ": expected float32 or bfloat16, got ", x.scalar_type());
  return body(float());
}

// What follows on a band where nothing does.
constexpr auto kNothing = [](int64_t, int64_t, int64_t) {};

// Over images of one size, float or bfloat16 (T), with memory that its convolutions share.
template <typename T>
class Convolutions {
 protected:
  static constexpr bool kFloat = std::is_same_v<T, float>;

  explicit Convolutions(const Tensor& x)
      : n_(x.size(0)), h_(x.size(2)), w_(x.size(3)), rows_(n_ * h_ * w_), parts_(rows_), options_(x.options()) {}

  Tensor empty_nhwc(int64_t channels) const {
    return at::empty({n_, channels, h_, w_}, options_.memory_format(at::MemoryFormat::ChannelsLast));
  }
  Tensor nhwc(T* data, int64_t channels) const {
    return at::from_blob(data, {n_, h_, w_, channels}, options_).permute({0, 3, 1, 2});
  }
  // Memory that the convolutions of a call share.
  template <typename Of = T>
  Of* room(Tensor& kept, int64_t size) const {
    if (!kept.defined() || kept.numel() < size) kept = at::empty({size}, options_.dtype(c10::CppTypeToScalarType<Of>::value));
    return kept.data_ptr<Of>();
  }
  T* materialised(Tensor& kept, int64_t channels) const { return room(kept, rows_ * channels); }

  // Whether a convolution is done by winograd.h: enough tiles and channels to pay for the transforms.
  bool by_tiles(const Tensor& w) const {
    const int64_t outputs = w.size(0), channels = w.size(1), least = narrow(channels, outputs) ? 8 : 16;
    return kFloat && w.size(2) == 3 && outputs >= least && channels >= least && h_ >= 4 && w_ >= 4;
  }
  // [columns][rows] of a matrix [rows][columns], in memory that stays until the next of its kind is made there.
  const float* transposed(Tensor& kept, const float* matrix, int64_t rows, int64_t columns) const {
    float* out = room<float>(kept, rows * columns);
    constexpr int64_t kEach = 64;
    at::parallel_for(0, (columns + kEach - 1) / kEach, 4, [&](int64_t from, int64_t to) {
      const int64_t first = from * kEach, n = std::min(columns, to * kEach) - first;
      transpose_rows({{matrix + first, columns}, rows, n, {out + first * rows, rows}});
    });
    return out;
  }
  // A weight [outputs, channels, 1, 1] as the right side of a product: [channels][outputs], in bfloat16 in pairs of channels.
  const T* turned(const Tensor& w) {
    const int64_t outputs = w.size(0), channels = w.size(1);
    if constexpr (kFloat) {
      if (outputs_last(w)) return w.const_data_ptr<float>();
      return transposed(turned_, w.contiguous().template const_data_ptr<T>(), outputs, channels);
    } else {
      const Tensor pairs = at::constant_pad_nd(w.reshape({outputs, channels}), {0, channels % 2}).contiguous();
      return reinterpret_cast<const T*>(
          transposed(turned_, reinterpret_cast<const float*>(pairs.template const_data_ptr<T>()), outputs, even(channels) / 2));
    }
  }
  // w [outputs, channels, 3, 3] in tiles' form, or the weight of the convolution that its gradient is.
  TileWeight tile_weight(const Tensor& w, bool gradient) {
    const int64_t outputs = w.size(0), channels = w.size(1), size = outputs * channels;
    const int64_t read = gradient ? outputs : channels, written = gradient ? channels : outputs;
    const bool taps_first = w.is_contiguous(at::MemoryFormat::ChannelsLast);  // [outputs][9][channels]
    const bool rows = narrow(channels, outputs);
    float* tiles = room<float>(tiles_, rows ? TransformWeightRows::size(read, written) : 16 * size);
    // What is read from `first` on: n times `written` values, one behind the other, their nine taps a pitch apart.
    auto put = [&](const float* from, int64_t pitch, int64_t first, int64_t n) {
      if (!rows) return transform_weight({from, pitch, n * written, tiles + first * written, size, false});
      for (int64_t i = 0; i < n; ++i)
        transform_weight_rows({from + i * written, pitch, written, tiles + (first + i) * 4 * kLine, read});
    };
    if (gradient && taps_first) {
      const float* last = w.const_data_ptr<float>() + 8 * channels;
      at::parallel_for(0, outputs, 8, [&](int64_t from, int64_t to) {
        for (int64_t k = from; k < to; ++k) put(last + 9 * k * channels, -channels, k, 1);
      });
    } else if (gradient) {
      const Tensor dense = w.contiguous();
      at::parallel_for(0, outputs, 8, [&](int64_t from, int64_t to) {
        Floats taps(9 * channels);
        for (int64_t k = from; k < to; ++k) {
          const float* of = dense.const_data_ptr<float>() + 9 * k * channels;
          for (int64_t tap = 0; tap < 9; ++tap)
            for (int64_t c = 0; c < channels; ++c) taps[(8 - tap) * channels + c] = of[9 * c + tap];
          put(taps.data(), channels, k, 1);
        }
      });
    } else if (outputs_last(w)) {
      at::parallel_for(0, channels, 16, [&](int64_t from, int64_t to) {
        put(w.const_data_ptr<float>() + from * outputs, size, from, to - from);
      });
    } else {
      const Tensor dense = taps_first ? w : w.contiguous();
      const float* taps = transposed(taps_, dense.const_data_ptr<float>(), outputs, 9 * channels);
      at::parallel_for(0, channels, 16, [&](int64_t from, int64_t to) {
        if (taps_first) return put(taps + from * outputs, size, from, to - from);
        for (int64_t c = from; c < to; ++c) put(taps + 9 * c * outputs, outputs, c, 1);
      });
    }
    return {tiles, rows};
  }
  // load(row, n, out), which brings pixels, as load_band calls it.
  template <typename Load>
  auto by_rows(const Load& load, int64_t channels) const {
    return [&load, channels, this](int64_t pixel, int64_t rows, T* out, int64_t pitch) {
      for (int64_t i = 0; i < rows; ++i) load(pixel + i * w_, w_, Slot<T>{out + i * pitch, channels});
    };
  }

  // The convolution of what `load` brings, where by_tiles.
  template <typename Load>
  void convolve_by_tiles(const Tensor& w, int64_t channels, const Load& load, Slot<float> out) {
    const Bands bands = Bands::among(at::get_num_threads(), n_, h_, w_, channels + w.size(0));
    winograd(bands, channels, w.size(0), by_rows(load, channels), tile_weight(w, false), out, kNothing);
  }
  // Whether a convolution of images too small for tiles is one product, of each pixel with its neighbours: oneDNN would lay the
  // weight anew in each call.
  bool by_neighbours(const Tensor& w) const { return kFloat && w.size(2) == 3 && (h_ < 4 || w_ < 4) && outputs_last(w); }
  void convolve_by_neighbours(const Tensor& w, const float* x, Slot<float> out) const {
    constexpr int64_t kRows = 16;
    const int64_t outputs = w.size(0), channels = w.size(1), size = 9 * channels;
    at::parallel_for(0, (rows_ + kRows - 1) / kRows, 1, [&](int64_t from, int64_t to) {
      float* taps = scratch(4, kRows * size);
      for (int64_t first = from * kRows; first < std::min(rows_, to * kRows); first += kRows) {
        const int64_t n = std::min(kRows, rows_ - first);
        float* tap = taps;
        for (int64_t i = first; i < first + n; ++i) {
          const int64_t row = i / w_ % h_, column = i % w_;
          for (int64_t k = 0; k < 9; ++k, tap += channels) {
            const int64_t down = k / 3 - 1, right = k % 3 - 1;
            const bool inside = row + down >= 0 && row + down < h_ && column + right >= 0 && column + right < w_;
            inside ? void(std::copy_n(x + (i + down * w_ + right) * channels, channels, tap)) : void(std::fill_n(tap, channels, 0.f));
          }
        }
        at::native::cpublas::brgemm(n, outputs, size, size, outputs, out.pitch, false, taps, w.const_data_ptr<float>(), out.row(first).data);
      }
      at::native::cpublas::brgemm_release();
    });
  }
  // The same by ATen.
  Tensor convolve(const Tensor& w, int64_t channels, T* normalised) const {
    const Tensor x = laid(nhwc(normalised, channels), in_rows(w));
    return at::conv2d(x, w, {}, 1, w.size(2) / 2).contiguous(at::MemoryFormat::ChannelsLast);
  }
  bool in_rows(const Tensor& w) const { return !follows(w, rows_ * (w.size(0) + w.size(1))); }
  template <typename Load>
  T* materialise(int64_t channels, const Load& load) {
    T* out = materialised(normalised_, channels);
    parts_.run([&](int64_t, int64_t from, int64_t to) { load(from, to - from, Slot<T>{out + from * channels, channels}); });
    return out;
  }

  // The gradients of what a convolution read, which `load` brings, and of its weight.
  template <typename Load>
  std::pair<Tensor, Tensor> conv_backward(const T* grad, int64_t growth, const Load& load, int64_t channels, const Tensor& w) {
    if constexpr (kFloat) {
      if (by_tiles(w)) {
        Tensor dact = reused(dact_, channels);
        const Bands bands = Bands::among(at::get_num_threads(), n_, h_, w_, channels + growth);
        data_gradient_by_tiles(bands, grad, w, {dact.data_ptr<float>(), channels}, kNothing);
        return {dact, weight_gradient_by_tiles(grad, load, w)};
      }
    }
    return convolve_backward(grad, growth, load, channels, w);
  }
  // The same by ATen.
  template <typename Load>
  std::pair<Tensor, Tensor> convolve_backward(const T* grad, int64_t growth, const Load& load, int64_t channels, const Tensor& w,
                                              bool need_data = true, bool need_weight = true) {
    const int64_t pad = w.size(2) / 2;
    const Tensor d = laid(nhwc(const_cast<T*>(grad), growth), in_rows(w));
    const Tensor act = laid(nhwc(materialise(channels, load), channels), in_rows(w));
    auto [dact, dw, dbias] = at::convolution_backward(d, act, w, std::nullopt, {1, 1}, {pad, pad}, {1, 1}, false, {0, 0}, 1,
                                                      {need_data, need_weight, false});
    return {need_data ? dact.contiguous(at::MemoryFormat::ChannelsLast) : Tensor(), need_weight ? lying_like(dw, w) : Tensor()};
  }
  template <typename Then>
  void data_gradient_by_tiles(const Bands& bands, const float* grad, const Tensor& w, Slot<float> out, const Then& then) {
    const int64_t outputs = w.size(0), channels = w.size(1);
    auto load = [&](int64_t row, int64_t n, Slot<float> to) { std::copy_n(grad + row * outputs, n * outputs, to.data); };
    winograd(bands, outputs, channels, by_rows(load, outputs), tile_weight(w, true), out, then);
  }
  template <typename Load>
  Tensor weight_gradient_by_tiles(const float* grad, const Load& load, const Tensor& w) {
    const int64_t outputs = w.size(0), channels = w.size(1);
    const Tensor taps = at::empty(w.sizes(), w.options().memory_format(at::MemoryFormat::ChannelsLast));
    const Taps out{taps.data_ptr<float>(), 9 * channels, channels};
    const Bands bands(n_, h_, w_, channels + outputs);  // which do not depend on the threads, as its parts must not
    if (narrow(channels, outputs)) {
      WeightGradient(bands, channels, outputs).by_rows(by_rows(load, channels), {grad, outputs}, out);
    } else if (WeightGradient::fits(bands, channels, outputs)) {
      const Bands spread(n_, h_, w_, channels + outputs, at::get_num_threads());
      WeightGradient(spread, channels, outputs).at_once(by_rows(load, channels), {grad, outputs}, out);
    } else {
      WeightGradient(bands, channels, outputs).by_parts(by_rows(load, channels), {grad, outputs}, out);
    }
    if (!w.is_contiguous()) return lying_like(taps, w);
    const Tensor dw = at::empty_like(w);
    at::parallel_for(0, outputs, 8, [&](int64_t from, int64_t to) {
      for (int64_t k = from; k < to; ++k) {
        const float* of = taps.const_data_ptr<float>() + 9 * k * channels;
        float* d = dw.data_ptr<float>() + 9 * k * channels;
        for (int64_t c = 0; c < channels; ++c)
          for (int64_t tap = 0; tap < 9; ++tap) d[9 * c + tap] = of[tap * channels + c];
      }
    });
    return dw;
  }
  Tensor reused(Tensor& kept, int64_t channels) const {
    materialised(kept, channels);
    return kept;
  }

  // Mean and variance of each channel of x.
  void take_moments_of(Slot<const T> x, int64_t channels, float* mean_out, float* var_out) const {
    const int64_t pad = padded(channels);
    Aligned<double> mean(parts_.count * pad), m2(mean.size());
    parts_.run([&](int64_t part, int64_t from, int64_t to) {
      if (to > from)
        moments_of_rows<T>({x.row(from), to - from, channels, mean.data() + part * pad, m2.data() + part * pad});
    });
    merge(parts_, mean, m2, channels, mean_out, var_out);
  }

  // Sums of pieces [count][2][padded] in order: sum g, and sum g * x_hat.
  struct Sums {
    std::vector<double> grad, product;
  };
  static Sums total(const Aligned<double>& sums, const Read& read, int64_t channels) {
    Sums s{std::vector<double>(channels), std::vector<double>(channels)};
    const int64_t pad = padded(channels), count = static_cast<int64_t>(sums.size()) / (2 * pad);
    for (int64_t p = 0; p < count; ++p)
      for (int64_t c = 0; c < channels; ++c) {
        s.grad[c] += sums[2 * p * pad + c];
        s.product[c] += sums[(2 * p + 1) * pad + c];
      }
    for (int64_t c = 0; c < channels; ++c) s.product[c] *= read.rstd[c];
    return s;
  }
  // The gradient of a weight, laid out as the weight is.
  static Tensor as_tensor(const std::vector<double>& v, const Tensor& like) {
    Tensor t = at::empty({static_cast<int64_t>(v.size())}, like.options().dtype(at::kFloat).memory_format(std::nullopt));
    std::copy(v.begin(), v.end(), t.data_ptr<float>());
    return t;
  }

  const int64_t n_, h_, w_, rows_;
  const Parts parts_;
  const at::TensorOptions options_;
  Tensor normalised_, dact_, turned_, taps_, tiles_;
};

}  // namespace rkfast
