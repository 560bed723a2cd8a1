#include <utility>

#include "cpu/accumulate.h"
#include "cpu/slots.h"

namespace rkfast {
inline namespace CPU_CAPABILITY {
namespace {

using Vec = Vectorized<float>;
using BFloat16 = c10::BFloat16;
constexpr int kWidth = Vec::size();

// Float or bfloat16 elements in V registers of float.
template <int V>
struct Lanes {
  static constexpr int kLanes = V * kWidth;
  Vec v[V];
};

// As many registers as the widest step over a row of T has.
template <typename T>
constexpr int kVecs = Pack<T>::kVecs;

template <int V, typename T, typename N>
inline Lanes<V> load_lanes(const T* p, N n) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    const Pack<T> x = load<Pack<T>>(p, n);
    return {x.v[0], x.v[1]};
  } else if constexpr (kIsFull<N>) {
    Lanes<V> x;
    for (int k = 0; k < V; ++k) x.v[k] = Vec::loadu(p + k * kWidth);
    return x;
  } else {
    Lanes<V> x;
    for (int k = 0; k < V; ++k) x.v[k] = Vec::loadu(p + k * kWidth, std::clamp(n - k * kWidth, 0, kWidth));
    return x;
  }
}

template <int V, typename T, typename N>
inline void store_lanes(const Lanes<V>& x, T* p, N n) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    store(Pack<T>{x.v[0], x.v[1]}, p, n);
  } else {
    for (int k = 0; k < V; ++k) {
      if constexpr (kIsFull<N>) {
        x.v[k].store(p + k * kWidth);
      } else if (n > k * kWidth) {
        x.v[k].store(p + k * kWidth, std::min(n - k * kWidth, kWidth));
      }
    }
  }
}

// body(c, U, n): U steps of V registers of channels from c on, all full, or the last one with n.
template <int V, typename Body>
void over_channels(int64_t channels, Body&& body) {
  along<Lanes<V>, 4 / V>(channels, std::forward<Body>(body));
}

template <typename G, typename T>
void normalise(const NormaliseRows<G, T>& a) {
  constexpr int V = kVecs<T>;
  over_channels<V>(a.channels, [&](int64_t c, auto unroll, auto n) {
    constexpr int U = decltype(unroll)::value;
    Vec scale[U * V], shift[U * V];
    for (int u = 0; u < U * V; ++u) {
      scale[u] = Vec::loadu(a.scale + c + u * kWidth);
      shift[u] = Vec::loadu(a.shift + c + u * kWidth);
    }
    const Vec zero(0.f);
    const G* x = a.x.data + c;
    T* out = a.out.data + c;
    const int64_t x_pitch = a.x.pitch, out_pitch = a.out.pitch, rows = a.rows;
    for (int64_t i = 0; i < rows; ++i, x += x_pitch, out += out_pitch) {
      for (int u = 0; u < U; ++u) {
        Lanes<V> v = load_lanes<V>(x + u * V * kWidth, n);
        for (int k = 0; k < V; ++k)
          v.v[k] = at::vec::clamp_min(at::vec::fmadd(v.v[k], scale[u * V + k], shift[u * V + k]), zero);
        store_lanes<V>(v, out + u * V * kWidth, n);
      }
    }
  });
}

template <typename T>
void moments(const MomentsOfRows<T>& a) {
  Shape s{};
  s.channels_last = true;
  s.length = s.last = a.channels;
  s.inner = a.rows;
  s.outer = s.replicas = 1;
  ColumnMoments<T> columns(s, a.mean, a.m2);
  const int64_t tile = tile_rows(s);
  for (int64_t i = 0; i < a.rows; i += tile)
    columns.add(a.x.row(i).data, a.x.pitch, std::min(tile, a.rows - i));
  columns.finish();
}

template <bool kX, bool kKeep, typename G, typename T>
void finish(const FinishRows<G, T>& a) {
  constexpr int V = kVecs<T>;
  over_channels<V>(a.channels, [&](int64_t c, auto unroll, auto n) {
    constexpr int U = decltype(unroll)::value;
    Vec center[U * V], slope[U * V], offset[U * V];
    if constexpr (kX) {
      for (int u = 0; u < U * V; ++u) {
        center[u] = Vec::loadu(a.center + c + u * kWidth);
        slope[u] = Vec::loadu(a.slope + c + u * kWidth);
        offset[u] = Vec::loadu(a.offset + c + u * kWidth);
      }
    }
    const Vec scale(a.keep_scale);
    const G* grad = a.grad.data + c;
    const T* x = kX ? a.x.data + c : nullptr;
    const bool* keep = kKeep ? a.keep.data + c : nullptr;
    T* out = a.out.data + c;
    for (int64_t i = 0; i < a.rows; ++i) {
      for (int u = 0; u < U; ++u) {
        const int64_t at = u * V * kWidth;
        Lanes<V> g = load_lanes<V>(grad + i * a.grad.pitch + at, n);
        if constexpr (kX) {
          const Lanes<V> v = load_lanes<V>(x + i * a.x.pitch + at, n);
          for (int k = 0; k < V; ++k)
            g.v[k] = g.v[k] + at::vec::fmadd(v.v[k] - center[u * V + k], slope[u * V + k], offset[u * V + k]);
        }
        if constexpr (kKeep) {
          alignas(64) float kept[V * kWidth];
          const bool* from = keep + i * a.keep.pitch + at;
          for (int k = 0; k < V * kWidth; ++k) kept[k] = k < static_cast<int>(n) && from[k] ? 1.f : 0.f;
          for (int k = 0; k < V; ++k) g.v[k] = g.v[k] * scale * Vec::loadu(kept + k * kWidth);
        }
        store_lanes<V>(g, out + i * a.out.pitch + at, n);
      }
    }
  });
}

template <typename G, typename T>
void finish_any(const FinishRows<G, T>& a) {
  const bool x = a.x.data != nullptr, keep = a.keep.data != nullptr;
  x ? (keep ? finish<true, true>(a) : finish<true, false>(a)) : (keep ? finish<false, true>(a) : finish<false, false>(a));
}

template <bool kTotal, typename G, typename T>  // with act and total, or with masked
void read_backward(const ReadBackwardRows<G, T>& a) {
  constexpr int V = kVecs<T>;
  constexpr int64_t kBlockRows = 64, kFewRows = 8;  // whose sums are taken in float, those of few rows at a time
  over_channels<V>(a.channels, [&](int64_t c, auto unroll, auto n) {
    constexpr int U = decltype(unroll)::value;
    Vec scale[U * V], shift[U * V], center[U * V], factor[U * V];
    for (int u = 0; u < U * V; ++u) {
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
      const T* act = kTotal ? a.act.data + begin * act_pitch + c : nullptr;
      const G* grad = a.grad.data + begin * grad_pitch + c;
      const T* x = a.x.data + begin * x_pitch + c;
      float* total = kTotal ? a.total.data + begin * total_pitch + c : nullptr;
      G* masked = !kTotal ? a.masked.data + begin * masked_pitch + c : nullptr;
      Vec s0[U * V], s1[U * V], few0[U * V], few1[U * V];
      for (int u = 0; u < U * V; ++u) s0[u] = s1[u] = few0[u] = few1[u] = zero;
      for (int64_t i = begin; i < end; ++i) {
        for (int u = 0; u < U; ++u) {
          const int64_t at = u * V * kWidth;
          Lanes<V> g = load_lanes<V>(grad + at, n);
          const Lanes<V> v = load_lanes<V>(x + at, n);
          Lanes<V> r;
          if constexpr (kTotal) {
            r = load_lanes<V>(act + at, n);
          } else {
            for (int k = 0; k < V; ++k) r.v[k] = at::vec::fmadd(v.v[k], scale[u * V + k], shift[u * V + k]);
          }
          for (int k = 0; k < V; ++k) {
            g.v[k] = Vec::blendv(g.v[k], zero, r.v[k] <= zero);
            few0[u * V + k] = few0[u * V + k] + g.v[k];
            few1[u * V + k] = at::vec::fmadd(g.v[k], v.v[k] - center[u * V + k], few1[u * V + k]);
          }
          if constexpr (kTotal) {
            Lanes<V> sum = load_lanes<V>(total + at, n);
            for (int k = 0; k < V; ++k) sum.v[k] = at::vec::fmadd(scale[u * V + k], g.v[k], sum.v[k]);
            store_lanes<V>(sum, total + at, n);
          } else {
            for (int k = 0; k < V; ++k) g.v[k] = g.v[k] * factor[u * V + k];
            store_lanes<V>(g, masked + at, n);
          }
        }
        grad += grad_pitch, x += x_pitch;
        if constexpr (kTotal) {
          act += act_pitch, total += total_pitch;
        } else {
          masked += masked_pitch;
        }
        if ((i + 1 - begin) % kFewRows == 0 || i + 1 == end) {
          for (int u = 0; u < U * V; ++u) {
            s0[u] = s0[u] + few0[u];
            s1[u] = s1[u] + few1[u];
            few0[u] = few1[u] = zero;
          }
        }
      }
      for (int u = 0; u < U * V; ++u) {
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

template <typename G, typename T>
void read_backward_any(const ReadBackwardRows<G, T>& a) {
  a.act.data ? read_backward<true>(a) : read_backward<false>(a);
}

template <bool kOther, bool kRelu>
void add(const AddRows& a) {
  over_channels<1>(a.channels, [&](int64_t c, auto unroll, auto n) {
    constexpr int U = decltype(unroll)::value;
    const Vec zero(0.f);
    Vec shift[U];
    for (int u = 0; u < U; ++u) shift[u] = a.shift ? Vec::loadu(a.shift + c + u * kWidth) : zero;
    for (int64_t i = 0; i < a.rows; ++i) {
      for (int u = 0; u < U; ++u) {
        const int64_t at = c + u * kWidth;
        Vec v = load_lanes<1>(a.x.row(i).data + at, n).v[0] + shift[u];
        if constexpr (kOther) v = v + load_lanes<1>(a.other.row(i).data + at, n).v[0];
        if constexpr (kRelu) v = at::vec::clamp_min(v, zero);
        store_lanes<1>(Lanes<1>{v}, a.out.row(i).data + at, n);
      }
    }
  });
}

void add_any(const AddRows& a) {
  const bool other = a.other.data != nullptr;
  a.relu ? (other ? add<true, true>(a) : add<false, true>(a)) : (other ? add<true, false>(a) : add<false, false>(a));
}

void transpose(const TransposeRows& a) {
  constexpr int kSide = kWidth;
  const int64_t rows = a.rows / kSide * kSide, channels = a.channels / kSide * kSide;
  for (int64_t c = 0; c < channels; c += kSide)
    for (int64_t i = 0; i < rows; i += kSide)
      at::vec::transpose_mxn<float, kSide, kSide>(a.x.row(i).data + c, a.x.pitch, a.out.row(c).data + i, a.out.pitch);
  for (int64_t c = 0; c < a.channels; ++c)
    for (int64_t i = c < channels ? rows : 0; i < a.rows; ++i) a.out.row(c).data[i] = a.x.row(i).data[c];
}

void pair(const PairRows& a) {
  for (int64_t i = 0; i < a.rows; i += 2) {
    const uint16_t *low = a.x.row(i).data, *high = low + a.x.pitch;
    uint32_t* out = a.out.row(i / 2).data;
    if (i + 1 < a.rows) {
      for (int64_t c = 0; c < a.channels; ++c) out[c] = low[c] | static_cast<uint32_t>(high[c]) << 16;
    } else {
      std::copy_n(low, a.channels, out);
    }
  }
}

template <typename G, typename T>
struct Entered {
  Enter<NormaliseRows<G, T>> normalise_{normalise_rows<G, T>, kCapability, normalise<G, T>};
  Enter<FinishRows<G, T>> finish_{finish_rows<G, T>, kCapability, finish_any<G, T>};
  Enter<ReadBackwardRows<G, T>> read_backward_{read_backward_rows<G, T>, kCapability, read_backward_any<G, T>};
};
const Entered<float, float> entered;
const Entered<float, BFloat16> entered_mixed;
const Entered<BFloat16, BFloat16> entered_reduced;
const Enter<MomentsOfRows<float>> entered_moments(moments_of_rows<float>, kCapability, moments<float>);
const Enter<MomentsOfRows<BFloat16>> entered_reduced_moments(moments_of_rows<BFloat16>, kCapability, moments<BFloat16>);
const Enter<AddRows> entered_add(add_rows, kCapability, add_any);
const Enter<TransposeRows> entered_transpose(transpose_rows, kCapability, transpose);
const Enter<PairRows> entered_pair(pair_rows, kCapability, pair);

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace rkfast
