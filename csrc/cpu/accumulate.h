// Moments of a unit of rows while they are in cache. Included by *_kernel.cpp files only.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/arithmetic.h"
#include "cpu/pack.h"

namespace rkfast {
inline namespace CPU_CAPABILITY {

// Rows that are processed before the next ones are touched: they stay in the first-level cache from one step to the next.
inline int64_t tile_rows(const Shape& s) { return std::max<int64_t>(1, 8192 / std::max<int64_t>(s.length, 1)); }

// Moments along the columns of a unit of channels_last rows. Deviations are taken from the mean so far, in blocks of rows
// short enough for Acc; the blocks are merged in double.
template <typename T>
class ColumnMoments {
  using P = Pack<T>;
  using Acc = typename P::Acc;
  using Vec = typename P::Vec;
  static constexpr int64_t kBlock = 64;  // rows

 public:
  ColumnMoments(const Shape& s, double* mean, double* m2)
      : length_(s.length), padded_(s.padded()), mean_(mean), m2_(m2), scratch_(3 * padded_) {
    std::fill(mean_, mean_ + padded_, 0.0);
    std::fill(m2_, m2_ + padded_, 0.0);
  }

  void add(const T* x, int64_t pitch, int64_t rows) {
    if (count_ == 0 && block_ == 0) start(x, pitch, rows);
    while (rows > 0) {
      const int64_t n = std::min(rows, kBlock - block_);
      accumulate(x, pitch, n);
      x += n * pitch;
      rows -= n;
      if ((block_ += n) == kBlock) flush();
    }
  }

  void finish() { flush(); }

 private:
  Acc* center() { return scratch_.data(); }
  Acc* sum() { return scratch_.data() + padded_; }
  Acc* squares() { return scratch_.data() + 2 * padded_; }

  // The first center is the mean of the first rows.
  void start(const T* x, int64_t pitch, int64_t rows) {
    rows = std::min(rows, kBlock);
    accumulate(x, pitch, rows);
    for (int64_t c = 0; c < length_; ++c) {
      const Acc mean = sum()[c] / rows;
      center()[c] = std::isfinite(mean) ? mean : Acc(0);
      sum()[c] = squares()[c] = 0;
    }
  }

  void accumulate(const T* x, int64_t pitch, int64_t rows) {
    int64_t i = 0;
    for (; i + 4 <= rows; i += 4) add_rows<4>(x + i * pitch, pitch);
    for (; i < rows; ++i) add_rows<1>(x + i * pitch, pitch);
  }

  template <int R>
  void add_rows(const T* x, int64_t pitch) {
    int64_t c = 0;
    for (; c + P::kLanes <= length_; c += P::kLanes) step<R>(c, [&](int r) { return P::load(x + r * pitch + c); });
    // Lanes past the end belong to the padding, which nobody reads.
    if (c < length_) step<R>(c, [&](int r) { return P::load(x + r * pitch + c, static_cast<int>(length_ - c)); });
  }

  template <int R, typename Load>
  void step(int64_t c, Load load) {
    P x[R];
    for (int r = 0; r < R; ++r) x[r] = load(r);
    for (int k = 0; k < P::kVecs; ++k) {
      const int64_t at = c + k * P::kWidth;
      const Vec center = Vec::loadu(this->center() + at);
      // The rows at hand are summed among themselves first, which keeps the chain of roundings short.
      Vec sum = x[0].v[k] - center, squares = sum * sum;
      for (int r = 1; r < R; ++r) {
        const Vec d = x[r].v[k] - center;
        sum = sum + d;
        squares = at::vec::fmadd(d, d, squares);
      }
      (Vec::loadu(this->sum() + at) + sum).store(this->sum() + at);
      (Vec::loadu(this->squares() + at) + squares).store(this->squares() + at);
    }
  }

  void flush() {
    if (block_ == 0) return;
    for (int64_t c = 0; c < length_; ++c) {
      Welford<double> all{static_cast<double>(count_), mean_[c], m2_[c]};
      all.merge(Welford<double>::from_sums(block_, center()[c], sum()[c], squares()[c]));
      mean_[c] = all.mean;
      m2_[c] = all.m2;
      center()[c] = std::isfinite(all.mean) ? static_cast<Acc>(all.mean) : Acc(0);
      sum()[c] = squares()[c] = 0;
    }
    count_ += block_;
    block_ = 0;
  }

  int64_t length_, padded_;
  double *mean_, *m2_;
  std::vector<Acc> scratch_;
  int64_t count_ = 0, block_ = 0;
};

template <typename Vec>
double total(const Vec& v) {
  alignas(64) typename Vec::value_type lanes[Vec::size()];
  v.store(lanes);
  double sum = 0;
  for (auto lane : lanes) sum += lane;
  return sum;
}

// Moments of one contiguous row, a channel of a sample.
template <typename T>
Welford<double> row_moments(const T* x, int64_t length) {
  using P = Pack<T>;
  using Acc = typename P::Acc;
  using Vec = typename P::Vec;
  constexpr int64_t kBlock = 128 * P::kLanes;
  Welford<double> all;
  auto walk = [&](int64_t start, int64_t n, auto&& visit) {
    int64_t p = 0;
    for (; p + P::kLanes <= n; p += P::kLanes) visit(P::load(x + start + p), P::kAll);
    if (p < n) visit(P::load(x + start + p, static_cast<int>(n - p)), (1u << (n - p)) - 1);
  };
  for (int64_t start = 0; start < length; start += kBlock) {
    const int64_t n = std::min(kBlock, length - start);
    Acc center = static_cast<Acc>(all.mean);
    if (start == 0) {
      Vec sum[P::kVecs];
      for (auto& s : sum) s = Vec(Acc(0));
      walk(start, n, [&](const P& v, uint32_t) {
        for (int k = 0; k < P::kVecs; ++k) sum[k] = sum[k] + v.v[k];
      });
      double whole = 0;
      for (auto& s : sum) whole += total(s);
      center = static_cast<Acc>(whole / n);
    }
    if (!std::isfinite(center)) center = 0;
    const Vec c(center);
    Vec sum[P::kVecs], squares[P::kVecs];
    for (int k = 0; k < P::kVecs; ++k) sum[k] = squares[k] = Vec(Acc(0));
    walk(start, n, [&](const P& v, uint32_t lanes) {
      P d;
      for (int k = 0; k < P::kVecs; ++k) d.v[k] = v.v[k] - c;
      if (lanes != P::kAll) d = d.masked(lanes);
      for (int k = 0; k < P::kVecs; ++k) {
        sum[k] = sum[k] + d.v[k];
        squares[k] = at::vec::fmadd(d.v[k], d.v[k], squares[k]);
      }
    });
    double sum_all = 0, squares_all = 0;
    for (int k = 0; k < P::kVecs; ++k) {
      sum_all += total(sum[k]);
      squares_all += total(squares[k]);
    }
    all.merge(Welford<double>::from_sums(static_cast<double>(n), center, sum_all, squares_all));
  }
  return all;
}

// Walks the units of a shape on all cores: body(unit, sample, first row, end).
template <typename Body>
void for_each_unit(const Shape& s, int64_t cost, Body&& body) {
  const int64_t splits = s.splits(), units = s.units();
  auto run = [&](int64_t begin, int64_t end) {
    for (int64_t u = begin; u < end; ++u) {
      const int64_t o = u / splits, i = u % splits * s.unit;
      body(u, o, i, std::min(i + s.unit, s.inner));
    }
  };
  // Below this many element visits a second thread costs more than it brings.
  const int64_t elements = s.outer * s.inner * s.length * cost;
  if (units <= 1 || elements < 65536) return run(0, units);
  at::parallel_for(0, units, 1, run);
}

}  // namespace CPU_CAPABILITY
}  // namespace rkfast
