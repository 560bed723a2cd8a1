#include <utility>

#include "cpu/accumulate.h"
#include "cpu/slots.h"

namespace rkfast {
inline namespace CPU_CAPABILITY {
namespace {

using P = Pack<float>;
using Vec = P::Vec;
constexpr int64_t kWidth = P::kWidth;

// body(c, W, n): W registers of channels from c on, all full, or the last one with n.
template <typename Body>
void over_channels(int64_t channels, Body&& body) {
  along<P, 4>(channels, std::forward<Body>(body));
}

void normalise(const NormaliseRows& a) {
  over_channels(a.channels, [&](int64_t c, auto unroll, auto n) {
    constexpr int U = decltype(unroll)::value;
    Vec scale[U], shift[U];
    for (int u = 0; u < U; ++u) {
      scale[u] = Vec::loadu(a.scale + c + u * kWidth);
      shift[u] = Vec::loadu(a.shift + c + u * kWidth);
    }
    const float* x = a.x.data + c;
    float* out = a.out.data + c;
    const int64_t x_pitch = a.x.pitch, out_pitch = a.out.pitch, rows = a.rows;
    for (int64_t i = 0; i < rows; ++i, x += x_pitch, out += out_pitch) {
      for (int u = 0; u < U; ++u) {
        P v = load<P>(x + u * kWidth, n);
        v.v[0] = at::vec::fmadd(v.v[0], scale[u], shift[u]);
        store(v.relu(), out + u * kWidth, n);
      }
    }
  });
}

void moments(const MomentsOfRows& a) {
  Shape s{};
  s.channels_last = true;
  s.length = s.last = a.channels;
  s.inner = a.rows;
  s.outer = s.replicas = 1;
  ColumnMoments<float> columns(s, a.mean, a.m2);
  const int64_t tile = tile_rows(s);
  for (int64_t i = 0; i < a.rows; i += tile)
    columns.add(a.x.row(i).data, a.x.pitch, std::min(tile, a.rows - i));
  columns.finish();
}

template <bool kX, bool kKeep>
void finish(const FinishRows& a) {
  over_channels(a.channels, [&](int64_t c, auto unroll, auto n) {
    constexpr int U = decltype(unroll)::value;
    Vec center[U], slope[U], offset[U];
    if constexpr (kX) {
      for (int u = 0; u < U; ++u) {
        center[u] = Vec::loadu(a.center + c + u * kWidth);
        slope[u] = Vec::loadu(a.slope + c + u * kWidth);
        offset[u] = Vec::loadu(a.offset + c + u * kWidth);
      }
    }
    const Vec scale(a.keep_scale);
    const float *grad = a.grad.data + c, *x = kX ? a.x.data + c : nullptr;
    const bool* keep = kKeep ? a.keep.data + c : nullptr;
    float* out = a.out.data + c;
    for (int64_t i = 0; i < a.rows; ++i) {
      for (int u = 0; u < U; ++u) {
        P g = load<P>(grad + i * a.grad.pitch + u * kWidth, n);
        if constexpr (kX) {
          const P v = load<P>(x + i * a.x.pitch + u * kWidth, n);
          g.v[0] = g.v[0] + at::vec::fmadd(v.v[0] - center[u], slope[u], offset[u]);
        }
        if constexpr (kKeep) {
          alignas(64) float kept[kWidth];
          const bool* from = keep + i * a.keep.pitch + u * kWidth;
          for (int k = 0; k < kWidth; ++k) kept[k] = k < static_cast<int>(n) && from[k] ? 1.f : 0.f;
          g.v[0] = g.v[0] * scale * Vec::loadu(kept);
        }
        store(g, out + i * a.out.pitch + u * kWidth, n);
      }
    }
  });
}

void finish_any(const FinishRows& a) {
  const bool x = a.x.data != nullptr, keep = a.keep.data != nullptr;
  x ? (keep ? finish<true, true>(a) : finish<true, false>(a)) : (keep ? finish<false, true>(a) : finish<false, false>(a));
}

template <bool kTotal>  // with act and total, or with masked
void read_backward(const ReadBackwardRows& a) {
  constexpr int64_t kBlockRows = 64, kFewRows = 8;  // whose sums are taken in float, those of few rows at a time
  over_channels(a.channels, [&](int64_t c, auto unroll, auto n) {
    constexpr int U = decltype(unroll)::value;
    Vec scale[U], shift[U], center[U], factor[U];
    for (int u = 0; u < U; ++u) {
      scale[u] = Vec::loadu(a.scale + c + u * kWidth);
      factor[u] = a.scaled ? scale[u] : Vec(1.f);
      if constexpr (!kTotal) shift[u] = Vec::loadu(a.shift + c + u * kWidth);
      center[u] = Vec::loadu(a.center + c + u * kWidth);
    }
    const Vec zero(0.f);
    const int64_t act_pitch = a.act.pitch, grad_pitch = a.grad.pitch, x_pitch = a.x.pitch;
    const int64_t total_pitch = a.total.pitch, masked_pitch = a.masked.pitch;
    for (int64_t begin = 0; begin < a.rows; begin += kBlockRows) {
      const int64_t end = std::min(begin + kBlockRows, a.rows);
      const float* act = kTotal ? a.act.data + begin * act_pitch + c : nullptr;
      const float* grad = a.grad.data + begin * grad_pitch + c;
      const float* x = a.x.data + begin * x_pitch + c;
      float* total = kTotal ? a.total.data + begin * total_pitch + c : nullptr;
      float* masked = !kTotal ? a.masked.data + begin * masked_pitch + c : nullptr;
      Vec s0[U], s1[U], few0[U], few1[U];
      for (int u = 0; u < U; ++u) s0[u] = s1[u] = few0[u] = few1[u] = zero;
      for (int64_t i = begin; i < end; ++i) {
        for (int u = 0; u < U; ++u) {
          P g = load<P>(grad + u * kWidth, n);
          const P v = load<P>(x + u * kWidth, n);
          Vec r;
          if constexpr (kTotal) {
            r = load<P>(act + u * kWidth, n).v[0];
          } else {
            r = at::vec::fmadd(v.v[0], scale[u], shift[u]);
          }
          g.v[0] = Vec::blendv(g.v[0], zero, r <= zero);
          few0[u] = few0[u] + g.v[0];
          few1[u] = at::vec::fmadd(g.v[0], v.v[0] - center[u], few1[u]);
          if constexpr (!kTotal) store(P{g.v[0] * factor[u]}, masked + u * kWidth, n);
          if constexpr (kTotal) {
            P sum = load<P>(total + u * kWidth, n);
            sum.v[0] = at::vec::fmadd(scale[u], g.v[0], sum.v[0]);
            store(sum, total + u * kWidth, n);
          }
        }
        grad += grad_pitch, x += x_pitch;
        if constexpr (kTotal) {
          act += act_pitch, total += total_pitch;
        } else {
          masked += masked_pitch;
        }
        if ((i + 1 - begin) % kFewRows == 0 || i + 1 == end) {
          for (int u = 0; u < U; ++u) {
            s0[u] = s0[u] + few0[u];
            s1[u] = s1[u] + few1[u];
            few0[u] = few1[u] = zero;
          }
        }
      }
      for (int u = 0; u < U; ++u) {
        alignas(64) float first[kWidth], second[kWidth];
        s0[u].store(first);
        s1[u].store(second);
        const int64_t at = c + u * kWidth;
        for (int64_t k = 0; k < kWidth && at + k < a.channels; ++k) {
          a.sums[0][at + k] += first[k];
          a.sums[1][at + k] += second[k];
        }
      }
    }
  });
}

void read_backward_any(const ReadBackwardRows& a) {
  a.act.data ? read_backward<true>(a) : read_backward<false>(a);
}

void transpose(const TransposeRows& a) {
  constexpr int kSide = static_cast<int>(kWidth);
  const int64_t rows = a.rows / kSide * kSide, channels = a.channels / kSide * kSide;
  for (int64_t i = 0; i < rows; i += kSide)
    for (int64_t c = 0; c < channels; c += kSide)
      at::vec::transpose_mxn<float, kSide, kSide>(a.x.row(i).data + c, a.x.pitch, a.out.row(c).data + i, a.out.pitch);
  for (int64_t c = 0; c < a.channels; ++c)
    for (int64_t i = c < channels ? rows : 0; i < a.rows; ++i) a.out.row(c).data[i] = a.x.row(i).data[c];
}

const Enter<NormaliseRows> entered_normalise(normalise_rows, kCapability, normalise);
const Enter<MomentsOfRows> entered_moments(moments_of_rows, kCapability, moments);
const Enter<FinishRows> entered_finish(finish_rows, kCapability, finish_any);
const Enter<ReadBackwardRows> entered_read_backward(read_backward_rows, kCapability, read_backward_any);
const Enter<TransposeRows> entered_transpose(transpose_rows, kCapability, transpose);

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace rkfast
