#include "cpu/pack.h"

namespace rkfast {
inline namespace CPU_CAPABILITY {
namespace {

template <typename P>
P vector_at(const void* v, int64_t c) {  // of Acc, padded to whole registers
  P result;
  for (int k = 0; k < P::kVecs; ++k) result.v[k] = P::Vec::loadu(static_cast<const typename P::Acc*>(v) + c + k * P::kWidth);
  return result;
}

// Pixel by pixel, as they lie in memory: what is per channel stays in the first-level cache.
template <typename T>
void pool(const PoolRows& a) {
  using P = Pack<T>;
  const T* x = static_cast<const T*>(a.x);
  T* out = static_cast<T*>(a.out);
  for (int64_t j = 0; j < a.columns; ++j, x += 2 * a.pixel, out += a.channels) {
    const T* const window[4] = {x, x + a.pixel, x + a.row, x + a.row + a.pixel};
    along<P, 1>(a.channels, [&](int64_t c, auto, auto n) {
      const P scale = vector_at<P>(a.scale, c), shift = vector_at<P>(a.shift, c), center = vector_at<P>(a.center, c);
      P total{};
      for (int i = 0; i < 4; ++i) {
        P v = load<P>(window[i] + c, n);
        for (int k = 0; k < P::kVecs; ++k) v.v[k] = at::vec::fmadd(v.v[k] - center.v[k], scale.v[k], shift.v[k]);
        v = v.relu();
        for (int k = 0; k < P::kVecs; ++k) total.v[k] = i == 0 ? v.v[k] : total.v[k] + v.v[k];
      }
      for (int k = 0; k < P::kVecs; ++k) total.v[k] = total.v[k] * typename P::Vec(typename P::Acc(0.25));
      store(total, out + c, n);
    });
  }
}

template <typename T, bool kSums, bool kSlope>
void pool_backward(const PoolRowsBackward& a) {
  using P = Pack<T>;
  using Vec = typename P::Vec;
  using Acc = typename P::Acc;
  const Vec zero(Acc(0));
  const int64_t channels = a.channels, padded = (channels + kPad - 1) / kPad * kPad;
  const T* x = static_cast<const T*>(a.x);
  T* dx = static_cast<T*>(a.dx);
  const bool stream = a.stream && !kSums && channels % P::kLanes == 0 && on_line(dx);
  Acc* sums = static_cast<Acc*>(a.row_sums);

  // A window, or pixels that belong to none.
  auto at_pixels = [&](const T* grad, int64_t column, int64_t wide) {
    along<P, 1>(channels, [&](int64_t c, auto, auto n) {
      const P center = vector_at<P>(a.center, c), scale = vector_at<P>(a.scale, c), shift = vector_at<P>(a.shift, c);
      P g, slope, offset, s0, s1;
      for (int k = 0; k < P::kVecs; ++k) g.v[k] = s0.v[k] = s1.v[k] = zero;
      if (grad) {
        g = load<P>(grad + c, n);
        for (int k = 0; k < P::kVecs; ++k) g.v[k] = g.v[k] * Vec(Acc(0.25));
      }
      if constexpr (kSlope) slope = vector_at<P>(a.slope, c), offset = vector_at<P>(a.offset, c);
      for (int64_t i = 0; i < a.rows; ++i) {
        for (int64_t j = column; j < column + wide; ++j) {
          P v = load<P>(x + i * a.row + j * a.pixel + c, n), d;
          for (int k = 0; k < P::kVecs; ++k) {
            v.v[k] = v.v[k] - center.v[k];
            const Vec open = Vec::blendv(g.v[k], zero, at::vec::fmadd(v.v[k], scale.v[k], shift.v[k]) <= zero);
            if constexpr (kSums) {
              s0.v[k] = s0.v[k] + open;
              s1.v[k] = at::vec::fmadd(open, v.v[k], s1.v[k]);
            } else {
              d.v[k] = scale.v[k] * open;
              if constexpr (kSlope) d.v[k] = d.v[k] + at::vec::fmadd(v.v[k], slope.v[k], offset.v[k]);
            }
          }
          if constexpr (!kSums) store(d, dx + (i * a.width + j) * channels + c, n, stream);
        }
      }
      if constexpr (kSums) {
        for (int k = 0; k < P::kVecs; ++k) {
          Acc *first = sums + c + k * P::kWidth, *second = first + padded;
          (Vec::loadu(first) + s0.v[k]).store(first);
          (Vec::loadu(second) + s1.v[k]).store(second);
        }
      }
    });
  };

  const T* grad = static_cast<const T*>(a.grad);
  if constexpr (kSums) {
    constexpr int64_t kFew = 8;  // windows whose sums are taken in Acc
    for (int64_t from = 0; from < a.columns; from += kFew) {
      std::fill_n(sums, 2 * padded, Acc(0));
      for (int64_t j = from; j < std::min(from + kFew, a.columns); ++j) at_pixels(grad + j * a.grad_pixel, 2 * j, 2);
      for (int64_t c = 0; c < channels; ++c) {
        a.sums[0][c] += sums[c];
        a.sums[1][c] += sums[padded + c];
      }
    }
  } else {
    const int64_t pooled = grad ? a.columns : 0;
    for (int64_t j = 0; j < pooled; ++j) at_pixels(grad + j * a.grad_pixel, 2 * j, 2);
    for (int64_t j = 2 * pooled; j < a.width; ++j) at_pixels(nullptr, j, 1);
    if (stream) fence_streams();
  }
}

void pool_any(const PoolRows& a) {
  with_type(a.dtype, [&](auto t) { pool<decltype(t)>(a); });
}

void pool_backward_any(const PoolRowsBackward& a) {
  with_type(a.dtype, [&](auto t) {
    using T = decltype(t);
    a.row_sums ? pool_backward<T, true, false>(a) : a.slope ? pool_backward<T, false, true>(a) : pool_backward<T, false, false>(a);
  });
}

const Enter<PoolRows> entered(pool_rows, kCapability, pool_any);
const Enter<PoolRowsBackward> entered_backward(pool_rows_backward, kCapability, pool_backward_any);

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace rkfast
