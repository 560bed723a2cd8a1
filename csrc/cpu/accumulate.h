// Moments of a unit of rows while they are in cache. Included by *_kernel.cpp files only.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/arithmetic.h"
#include "cpu/pack.h"

namespace rkfast {
inline namespace CPU_CAPABILITY {

// Rows that are processed before the next ones are touched: they stay in the first-level cache from one step to the next.
constexpr int64_t kTile = 4096;
inline int64_t tile_rows(const Shape& s) { return std::max<int64_t>(1, kTile / std::max<int64_t>(s.length, 1)); }

// Sums along columns: in Acc over few rows, then in double.
constexpr int64_t kBlock = 64;

template <typename Acc>
void move_to(double* total, Acc* part, int64_t n) {
  for (int64_t c = 0; c < n; ++c) {
    total[c] += part[c];
    part[c] = 0;
  }
}

// Moments along the columns of a unit of channels_last rows, from deviations from the mean of its first rows. However the
// mean drifts after them, those rows are part of the variance, and so nothing cancels.
template <typename T>
class ColumnMoments {
  using P = Pack<T>;
  using Acc = typename P::Acc;
  using Vec = typename P::Vec;

 public:
  ColumnMoments(const Shape& s, double* mean, double* m2)
      : length_(s.length), mean_(mean), m2_(m2), scratch_(3 * s.padded()),
        center_(scratch_.data()), sum_(center_ + s.padded()), squares_(sum_ + s.padded()) {
    std::fill_n(mean_, s.padded(), 0.0);
    std::fill_n(m2_, s.padded(), 0.0);
  }

  void add(const T* x, int64_t pitch, int64_t rows) {
    if (count_ == 0) start(x, pitch, std::min(rows, kBlock));
    count_ += rows;
    while (rows > 0) {
      const int64_t n = std::min(rows, kBlock - block_);
      accumulate(x, pitch, n);
      x += n * pitch;
      rows -= n;
      if ((block_ += n) == kBlock) flush();
    }
  }

  void finish() {
    flush();
    const double inverse = 1.0 / static_cast<double>(std::max<int64_t>(count_, 1));
    for (int64_t c = 0; c < length_; ++c) {
      const double offset = mean_[c] * inverse;
      const double m2 = m2_[c] - mean_[c] * offset;
      mean_[c] = center_[c] + offset;
      m2_[c] = m2 < 0 ? 0 : m2;
    }
  }

 private:
  void start(const T* x, int64_t pitch, int64_t rows) {
    accumulate(x, pitch, rows);
    for (int64_t c = 0; c < length_; ++c) {
      const Acc mean = sum_[c] / static_cast<Acc>(rows);
      center_[c] = std::isfinite(mean) ? mean : Acc(0);
      sum_[c] = squares_[c] = 0;
    }
  }

  void accumulate(const T* x, int64_t pitch, int64_t rows) {
    int64_t i = 0;
    for (; i + 4 <= rows; i += 4) add_rows<4>(x + i * pitch, pitch);
    for (; i < rows; ++i) add_rows<1>(x + i * pitch, pitch);
  }

  template <int R>
  void add_rows(const T* x, int64_t pitch) {
    const T* row[R];
    for (int r = 0; r < R; ++r) row[r] = x + r * pitch;
    along<P, 1>(length_, [&](int64_t p, auto, auto n) {
      P x[R];
      for (int r = 0; r < R; ++r) x[r] = load<P>(row[r] + p, n);
      for (int r = 0; r < R; ++r) __builtin_prefetch(row[r] + p + R * pitch);
      for (int k = 0; k < P::kVecs; ++k) {
        const int64_t at = p + k * P::kWidth;
        const Vec center = Vec::loadu(center_ + at);
        // The rows at hand are summed among themselves first, which keeps the chain of roundings short.
        Vec sum = x[0].v[k] - center, squares = sum * sum;
        for (int r = 1; r < R; ++r) {
          const Vec d = x[r].v[k] - center;
          sum = sum + d;
          squares = at::vec::fmadd(d, d, squares);
        }
        (Vec::loadu(sum_ + at) + sum).store(sum_ + at);
        (Vec::loadu(squares_ + at) + squares).store(squares_ + at);
      }
    });
  }

  void flush() {
    move_to(mean_, sum_, length_);
    move_to(m2_, squares_, length_);
    block_ = 0;
  }

  int64_t length_;
  double *mean_, *m2_;  // sums, until finish makes them moments
  Aligned<Acc> scratch_;
  Acc *center_, *sum_, *squares_;
  int64_t count_ = 0, block_ = 0;
};

// Of all lanes of all vectors.
template <typename Vec, size_t N>
double total(const Vec (&vectors)[N]) {
  constexpr int kLanes = Vec::size();
  alignas(64) typename Vec::value_type lanes[kLanes];
  alignas(64) double sums[kLanes] = {};
  for (const Vec& v : vectors) {
    v.store(lanes);
    for (int i = 0; i < kLanes; ++i) sums[i] += lanes[i];
  }
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  return sums[0];
}

// Moments of one contiguous row, a channel of a sample.
template <typename T>
Welford<double> row_moments(const T* x, int64_t length) {
  using P = Pack<T>;
  using Acc = typename P::Acc;
  using Vec = typename P::Vec;
  constexpr int64_t kRun = 64 * 4 * P::kLanes;  // elements that Acc sums before double takes over
  constexpr int U = 4;
  const int64_t first = std::min(length, kRun);
  Vec sum[U * P::kVecs], squares[U * P::kVecs];
  Vec center(Acc(0));
  double sum_all, squares_all;
  auto run = [&](int64_t start, int64_t n) {
    for (auto& s : sum) s = Vec(Acc(0));
    for (auto& s : squares) s = Vec(Acc(0));
    along<P, U>(n, [&](int64_t p, auto unroll, auto lanes) {
#pragma GCC unroll 4
      for (int u = 0; u < decltype(unroll)::value; ++u) {
        P d = load<P>(x + start + p + u * P::kLanes, lanes);
        for (int k = 0; k < P::kVecs; ++k) d.v[k] = d.v[k] - center;
        if constexpr (!kIsFull<decltype(lanes)>) d = d.masked((1u << lanes) - 1);
        for (int k = 0; k < P::kVecs; ++k) {
          sum[u * P::kVecs + k] = sum[u * P::kVecs + k] + d.v[k];
          squares[u * P::kVecs + k] = at::vec::fmadd(d.v[k], d.v[k], squares[u * P::kVecs + k]);
        }
      }
    });
    sum_all = total(sum);
    squares_all = total(squares);
  };
  run(0, first);
  const Acc mean = static_cast<Acc>(sum_all / static_cast<double>(std::max<int64_t>(first, 1)));
  const Acc origin = std::isfinite(mean) ? mean : Acc(0);
  center = Vec(origin);
  double sums = 0, squared = 0;
  for (int64_t start = 0; start < length; start += kRun) {
    run(start, std::min(kRun, length - start));
    sums += sum_all;
    squared += squares_all;
  }
  return Welford<double>::from_sums(static_cast<double>(length), origin, sums, squared);
}

// Walks the units of a shape on all cores: body(unit, sample, first row, end).
template <typename Body>
void for_each_unit(const Shape& s, int64_t cost, Body&& body) {
  const int64_t splits = s.splits(), units = s.units();
  auto run = [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const int64_t u = s.reverse ? begin + end - 1 - k : k;
      const int64_t o = u / splits, i = u % splits * s.unit;
      body(u, o, i, std::min(i + s.unit, s.inner));
    }
  };
  // Below this many element visits a second thread costs more than it brings.
  const int64_t elements = s.outer * s.inner * s.length * cost;
  if (units <= 1 || elements < 32768) return run(0, units);
  at::parallel_for(0, units, 1, run);
}

}  // namespace CPU_CAPABILITY
}  // namespace rkfast
