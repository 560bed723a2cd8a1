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

const Enter<TransformInput> entered_input(transform_input, kCapability, input);
const Enter<TransformOutput> entered_output(transform_output, kCapability, output);
const Enter<TransformGradient> entered_gradient(transform_gradient, kCapability, gradient);
const Enter<OuterProducts> entered_outer(outer_products, kCapability, outer);
const Enter<TransformWeight> entered_weight(transform_weight, kCapability, weight);

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace rkfast
