#include "cpu/pack.h"
#include "cpu/slots.h"

namespace rkfast {
inline namespace CPU_CAPABILITY {
namespace {

using P = Pack<float>;
using Vec = P::Vec;

void input(const TransformInput& a) {
  for (int64_t r = 0; r < a.rows; ++r) {
    for (int64_t t = 0; t < a.columns; ++t) {
      along<P, 1>(a.channels, [&](int64_t c, auto, auto n) {
        const float* x = a.x + 2 * r * a.row_pitch + 2 * t * a.pixel_pitch + c;
        Vec d[4][4], e[4][4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i)
#pragma GCC unroll 4
          for (int j = 0; j < 4; ++j) d[i][j] = load<P>(x + i * a.row_pitch + j * a.pixel_pitch, n).v[0];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          e[0][j] = d[0][j] - d[2][j];
          e[1][j] = d[1][j] + d[2][j];
          e[2][j] = d[2][j] - d[1][j];
          e[3][j] = d[1][j] - d[3][j];
        }
        float* out = a.out + (r * a.columns + t) * a.channels + c;
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          store(P{e[i][0] - e[i][2]}, out + (4 * i) * a.plane, n);
          store(P{e[i][1] + e[i][2]}, out + (4 * i + 1) * a.plane, n);
          store(P{e[i][2] - e[i][1]}, out + (4 * i + 2) * a.plane, n);
          store(P{e[i][1] - e[i][3]}, out + (4 * i + 3) * a.plane, n);
        }
      });
    }
  }
}

void output(const TransformOutput& a) {
  for (int64_t r = 0; r < a.rows; ++r) {
    for (int64_t t = 0; t < a.columns; ++t) {
      along<P, 1>(a.channels, [&](int64_t c, auto, auto n) {
        const float* m = a.m + (r * a.columns + t) * a.channels + c;
        Vec e[2][4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          Vec v[4];
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) v[i] = load<P>(m + (4 * i + j) * a.plane, n).v[0];
          e[0][j] = v[0] + v[1] + v[2];
          e[1][j] = v[1] - v[2] - v[3];
        }
        float* out = a.out + 2 * r * a.row_pitch + 2 * t * a.pixel_pitch + c;
        const bool below = 2 * r + 1 < a.height, beside = 2 * t + 1 < a.width;
        for (int i = 0; i < 2; ++i) {
          if (i == 1 && !below) break;
          store(P{e[i][0] + e[i][1] + e[i][2]}, out + i * a.row_pitch, n);
          if (beside) store(P{e[i][1] - e[i][2] - e[i][3]}, out + i * a.row_pitch + a.pixel_pitch, n);
        }
      });
    }
  }
}

void gradient(const TransformGradient& a) {
  for (int64_t r = 0; r < a.rows; ++r) {
    for (int64_t t = 0; t < a.columns; ++t) {
      along<P, 1>(a.channels, [&](int64_t c, auto, auto n) {
        const float* g = a.grad + 2 * r * a.row_pitch + 2 * t * a.pixel_pitch + c;
        const bool below = 2 * r + 1 < a.height, beside = 2 * t + 1 < a.width;
        const Vec zero(0.f);
        Vec y[2][2];
        y[0][0] = load<P>(g, n).v[0];
        y[0][1] = beside ? load<P>(g + a.pixel_pitch, n).v[0] : zero;
        y[1][0] = below ? load<P>(g + a.row_pitch, n).v[0] : zero;
        y[1][1] = below && beside ? load<P>(g + a.row_pitch + a.pixel_pitch, n).v[0] : zero;
        Vec s[4][2];
        for (int j = 0; j < 2; ++j) {
          s[0][j] = y[0][j];
          s[1][j] = y[0][j] + y[1][j];
          s[2][j] = y[0][j] - y[1][j];
          s[3][j] = zero - y[1][j];
        }
        float* out = a.out + (r * a.columns + t) * a.channels + c;
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          store(P{s[i][0]}, out + (4 * i) * a.plane, n);
          store(P{s[i][0] + s[i][1]}, out + (4 * i + 1) * a.plane, n);
          store(P{s[i][0] - s[i][1]}, out + (4 * i + 2) * a.plane, n);
          store(P{zero - s[i][1]}, out + (4 * i + 3) * a.plane, n);
        }
      });
    }
  }
}

// N outputs from o on, whose sums stay in registers.
template <int N, typename Count>
void outer_block(const OuterProducts& p, int64_t o, int64_t c, Count n) {
  float* sum = p.sum + o * p.channels + c;
  Vec sums[N];
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) sums[i] = load<P>(sum + i * p.channels, n).v[0];
  const float *a = p.a + o, *b = p.b + c;
  for (int64_t row = 0; row < p.rows; ++row, a += p.outputs, b += p.channels) {
    const Vec x = load<P>(b, n).v[0];
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) sums[i] = at::vec::fmadd(Vec(a[i]), x, sums[i]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) store(P{sums[i]}, sum + i * p.channels, n);
}

template <int N, typename Count>
int64_t outer_blocks(const OuterProducts& p, int64_t o, int64_t c, Count n) {
  for (; o + N <= p.outputs; o += N) outer_block<N>(p, o, c, n);
  if constexpr (N > 1) return outer_blocks<N / 2>(p, o, c, n);
  return o;
}

void outer(const OuterProducts& p) {
  constexpr int kRegisters = kCapability == 2 ? 16 : 8;
  along<P, 1>(p.channels, [&](int64_t c, auto, auto n) { outer_blocks<kRegisters>(p, 0, c, n); });
}

// One dimension of G w: 3 values to 4.
inline void widen(const Vec* w, int step, Vec* to) {
  const Vec half(0.5f), sum = w[0] + w[2 * step];
  to[0] = w[0];
  to[1] = half * (sum + w[step]);
  to[2] = half * (sum - w[step]);
  to[3] = w[2 * step];
}

// One dimension of G^T d: 4 values to 3.
inline void narrow(const Vec* d, int step, Vec* to) {
  const Vec half(0.5f), sum = half * (d[step] + d[2 * step]);
  to[0] = d[0] + sum;
  to[1] = half * (d[step] - d[2 * step]);
  to[2] = d[3 * step] + sum;
}

void weight(const TransformWeight& a) {
  along<P, 1>(a.size, [&](int64_t p, auto, auto n) {
    if (a.backwards) {
      Vec d[16], e[4][3], column[3];
      for (int q = 0; q < 16; ++q) d[q] = load<P>(a.from + q * a.from_pitch + p, n).v[0];
      for (int i = 0; i < 4; ++i) narrow(d + 4 * i, 1, e[i]);
      for (int j = 0; j < 3; ++j) {
        narrow(&e[0][j], 3, column);
        for (int i = 0; i < 3; ++i) store(P{column[i]}, a.to + (3 * i + j) * a.to_pitch + p, n);
      }
    } else {
      Vec w[9], e[3][4], column[4];
      for (int q = 0; q < 9; ++q) w[q] = load<P>(a.from + q * a.from_pitch + p, n).v[0];
      for (int i = 0; i < 3; ++i) widen(w + 3 * i, 1, e[i]);
      for (int j = 0; j < 4; ++j) {
        widen(&e[0][j], 4, column);
        for (int i = 0; i < 4; ++i) store(P{column[i]}, a.to + (4 * i + j) * a.to_pitch + p, n);
      }
    }
  });
}

void input_row(const TransformRow& a) {
  float* out = a.out;
  for (int64_t first = 0; first < a.channels; first += kLine) {
    const float* x = a.x + first;
    for (int64_t t = 0; t < a.columns; ++t, x += 2 * a.channels, out += 4 * kLine) {
      along<P, 1>(std::min(kLine, a.channels - first), [&](int64_t c, auto, auto n) {
        Vec d[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) d[j] = load<P>(x + j * a.channels + c, n).v[0];
        (d[0] - d[2]).store(out + c);
        (d[1] + d[2]).store(out + kLine + c);
        (d[2] - d[1]).store(out + 2 * kLine + c);
        (d[1] - d[3]).store(out + 3 * kLine + c);
      });
    }
  }
}

// Registers by themselves: so many sums in Vectorized<float> do not stay in them.
#if defined(CPU_CAPABILITY_AVX512)
using Register = __m512;
inline Register splat(float v) { return _mm512_set1_ps(v); }
inline Register multiply_add(Register a, Register b, Register c) { return _mm512_fmadd_ps(a, b, c); }
#elif defined(CPU_CAPABILITY_AVX2)
using Register = __m256;
inline Register splat(float v) { return _mm256_set1_ps(v); }
inline Register multiply_add(Register a, Register b, Register c) { return _mm256_fmadd_ps(a, b, c); }
#else
using Register = Vec;
inline Register splat(float v) { return Vec(v); }
inline Register multiply_add(const Register& a, const Register& b, const Register& c) { return at::vec::fmadd(a, b, c); }
#endif

// T pairs of pixels from column t on, a register of outputs from o on.
template <int T>
void row_block(const ConvolveRow& a, int64_t t, int64_t o) {
  Register sums[T][4];
#pragma GCC unroll 8
  for (int j = 0; j < T; ++j)
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) sums[j][q] = splat(0.f);
  const float* w = a.weights + o / kLine * 12 * a.channels * kLine + o % kLine;
  for (int r = 0; r < 3; ++r) {
    const float* x = a.rows[r] + 4 * kLine * t;
    for (int64_t first = 0; first < a.channels; first += kLine, x += 4 * kLine * a.columns) {
      const float* end = x + std::min(kLine, a.channels - first);
      for (const float* c = x; c < end; ++c, w += 4 * kLine) {
#pragma GCC unroll 4
        for (int q = 0; q < 4; ++q) {
          const Register g = Vec::loadu(w + q * kLine);
#pragma GCC unroll 8
          for (int j = 0; j < T; ++j) sums[j][q] = multiply_add(splat(c[(4 * j + q) * kLine]), g, sums[j][q]);
        }
      }
    }
  }
  const int n = static_cast<int>(std::min<int64_t>(P::kLanes, a.outputs - o));
#pragma GCC unroll 8
  for (int j = 0; j < T; ++j) {
    const Vec m0(sums[j][0]), m1(sums[j][1]), m2(sums[j][2]), m3(sums[j][3]);
    float* pixel = a.out.row(2 * (t + j)).data + o;
    store(P{m0 + (m1 + m2)}, pixel, n);
    if (2 * (t + j) + 1 < a.width) store(P{m1 - m2 - m3}, pixel + a.out.pitch, n);
  }
}

template <int T>
void row_blocks(const ConvolveRow& a, int64_t t, int64_t o, int64_t count) {
  if (count == T) return row_block<T>(a, t, o);
  if constexpr (T > 1) row_blocks<T - 1>(a, t, o, count);
}

void row(const ConvolveRow& a) {
  constexpr int kMost = kCapability == 2 ? 6 : 3;  // pairs of pixels whose sums the registers take
  const int64_t groups = (a.columns + kMost - 1) / kMost;
  for (int64_t o = 0; o < a.outputs; o += P::kLanes) {
    for (int64_t i = 0; i < groups; ++i) {
      const int64_t t = i * a.columns / groups;
      row_blocks<kMost>(a, t, o, (i + 1) * a.columns / groups - t);
    }
  }
}

void weight_rows(const TransformWeightRows& a) {
  along<P, 1>(a.outputs, [&](int64_t o, auto, auto n) {
    float* to = a.to + o / kLine * 12 * a.channels * kLine + o % kLine;
    for (int r = 0; r < 3; ++r) {
      Vec w[3], wide[4];
      for (int j = 0; j < 3; ++j) w[j] = load<P>(a.from + (3 * r + j) * a.from_pitch + o, n).v[0];
      widen(w, 1, wide);
      for (int q = 0; q < 4; ++q) wide[q].store(to + (4 * r * a.channels + q) * kLine);
    }
  });
}

void gradient_row(const TransformGradientRow& a) {
  const Vec zero(0.f);
  float* out = a.out;
  for (int64_t first = 0; first < a.outputs; first += kLine) {
    for (int64_t t = 0; t < a.columns; ++t, out += 4 * kLine) {
      const float* grad = a.grad.row(2 * t).data + first;
      const bool beside = 2 * t + 1 < a.width;
      along<P, 1>(std::min(kLine, a.outputs - first), [&](int64_t c, auto, auto n) {
        const Vec y0 = load<P>(grad + c, n).v[0], y1 = beside ? load<P>(grad + a.grad.pitch + c, n).v[0] : zero;
        y0.store(out + c);
        (y0 + y1).store(out + kLine + c);
        (y0 - y1).store(out + 2 * kLine + c);
        (zero - y1).store(out + 3 * kLine + c);
      });
    }
  }
}

// N outputs with the three rows: what is loaded of the gradient is multiplied three times.
template <int N>
void outer_rows(const float* const* rows, const float* grad, int64_t columns, float* sums) {
  Register kept[N][3];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i)
#pragma GCC unroll 3
    for (int r = 0; r < 3; ++r) kept[i][r] = Vec::loadu(sums + (3 * i + r) * kLine);
  const float *x0 = rows[0], *x1 = rows[1], *x2 = rows[2];
  for (int64_t t = 0; t < 4 * kLine * columns; t += 4 * kLine) {
    const Register x[3] = {Vec::loadu(x0 + t), Vec::loadu(x1 + t), Vec::loadu(x2 + t)};
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      const Register g = splat(grad[t + i]);
#pragma GCC unroll 3
      for (int r = 0; r < 3; ++r) kept[i][r] = multiply_add(g, x[r], kept[i][r]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i)
#pragma GCC unroll 3
    for (int r = 0; r < 3; ++r) Vec(kept[i][r]).store(sums + (3 * i + r) * kLine);
}

void outer_row_of(const OuterRow& a) {
  constexpr int kMost = kCapability == 2 ? 8 : 4;
  const int64_t block = 4 * kLine * a.columns;
  float* sums = a.sums;
  for (int64_t o = 0; o < lines(a.outputs); ++o) {
    for (int64_t c = 0; c < lines(a.channels); ++c) {
      for (int64_t q = 0; q < 4 * kLine; q += kLine, sums += 3 * kLine * kLine) {
        for (int64_t k = 0; k < kLine; k += kMost) {
          for (int64_t lane = 0; lane < kLine; lane += P::kLanes) {
            const float* rows[3];
            for (int r = 0; r < 3; ++r) rows[r] = a.rows[r] + c * block + q + lane;
            outer_rows<kMost>(rows, a.grad + o * block + q + k, a.columns, sums + 3 * k * kLine + lane);
          }
        }
      }
    }
  }
}

void finish_outer(const FinishOuterRow& a) {
  for (int64_t o = 0; o < a.outputs; ++o) {
    for (int64_t c = 0; c < a.channels; c += kLine) {
      const float* sums = a.sums + ((o / kLine * lines(a.channels) + c / kLine) * 4 * kLine + o % kLine) * 3 * kLine;
      float* to = a.to + o * a.output_pitch + c;
      along<P, 1>(std::min(kLine, a.channels - c), [&](int64_t lane, auto, auto n) {
        for (int r = 0; r < 3; ++r) {
          Vec d[4], taps[3];
          for (int q = 0; q < 4; ++q) d[q] = Vec::loadu(sums + (3 * q * kLine + r) * kLine + lane);
          narrow(d, 1, taps);
          for (int j = 0; j < 3; ++j) store(P{taps[j]}, to + (3 * r + j) * a.tap_pitch + lane, n);
        }
      });
    }
  }
}

const Enter<TransformGradientRow> entered_gradient_row(transform_gradient_row, kCapability, gradient_row);
const Enter<OuterRow> entered_outer_row(outer_row, kCapability, outer_row_of);
const Enter<FinishOuterRow> entered_finish_outer(finish_outer_row, kCapability, finish_outer);
const Enter<TransformRow> entered_input_row(transform_row, kCapability, input_row);
const Enter<ConvolveRow> entered_row(convolve_row, kCapability, row);
const Enter<TransformWeightRows> entered_weight_rows(transform_weight_rows, kCapability, weight_rows);
const Enter<TransformInput> entered_input(transform_input, kCapability, input);
const Enter<TransformOutput> entered_output(transform_output, kCapability, output);
const Enter<TransformGradient> entered_gradient(transform_gradient, kCapability, gradient);
const Enter<OuterProducts> entered_outer(outer_products, kCapability, outer);
const Enter<TransformWeight> entered_weight(transform_weight, kCapability, weight);

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace rkfast
