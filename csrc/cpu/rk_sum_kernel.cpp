#include <ATen/Parallel.h>

#include <array>
#include <utility>

#include "cpu/accumulate.h"

namespace rkfast {
inline namespace CPU_CAPABILITY {
namespace {

inline int64_t row_length(const Shape& s, int64_t i) { return i == s.inner - 1 ? s.last : s.length; }

// A row of act(sum_j factor_j * term_j + shift). The number of terms is known, so that pointers and factors stay in
// registers: they need not be read again after each store.
template <typename P, int N, typename T, typename Acc>
void sum_row(const T* const* terms, const RowFactor<Acc>* factors, Acc shift, bool relu, T* out, int64_t length) {
  using Vec = typename P::Vec;
  const T* term[N];
  Vec factor[N];
  for (int j = 0; j < N; ++j) {
    term[j] = terms[j];
    factor[j] = Vec(factors[j].scalar);
  }
  const Vec start(shift);
  along<P, 2>(length, [&](int64_t p, auto unroll, auto lanes) {
#pragma GCC unroll 2
    for (int u = 0; u < decltype(unroll)::value; ++u) {
      const int64_t q = p + u * P::kLanes;
      P sum;
      for (auto& v : sum.v) v = start;
#pragma GCC unroll 16
      for (int j = 0; j < N; ++j) {
        const P x = load<P>(term[j] + q, lanes);
        for (int k = 0; k < P::kVecs; ++k) sum.v[k] = at::vec::fmadd(x.v[k], factor[j], sum.v[k]);
      }
      if (relu) sum = sum.relu();
      store(sum, out + q, lanes);
    }
  });
}

template <typename P, typename T, typename Acc, size_t... N>
constexpr auto sum_rows(std::index_sequence<N...>) {
  return std::array{&sum_row<P, static_cast<int>(N) + 1, T, Acc>...};
}

// Rows of out = act(sum_j factor_j * (term_j - center_j) + shift), all terms of a few registers at a time.
template <typename T>
class CombineRows {
  using P = Pack<T>;
  using Acc = typename P::Acc;
  using Vec = typename P::Vec;

 public:
  explicit CombineRows(const Combine& a)
      : a_(a), s_(a.shape), vectors_(a.shape.channels_last && a.factors[0].vector != nullptr),
        mask_pitch_((s_.length + 7) / 8) {}

  // The mask of the rows begins at `mask` where it is not the call's own.
  void run(int64_t o, int64_t begin, int64_t end, uint8_t* mask = nullptr) const {
    if (mask == nullptr && a_.mask != nullptr) mask = a_.mask + (o * s_.inner + begin) * mask_pitch_;
    for (int64_t i = begin; i < end; ++i, mask += mask ? mask_pitch_ : 0)
      vectors_ ? run_row<true>(o, i, mask) : run_row<false>(o, i, mask);
  }

 private:
  template <bool kVectors>
  void run_row(int64_t o, int64_t i, uint8_t* mask) const {
    const int n = a_.n;
    const bool relu = a_.relu;
    const T* term[kMaxTerms];
    RowFactor<Acc> factor[kMaxTerms];
    for (int j = 0; j < n; ++j) {
      term[j] = row<const T>(a_.terms[j], o, i);
      factor[j] = RowFactor<Acc>(a_.factors[j], s_, o, i);
    }
    const RowFactor<Acc> shift(a_.shift, s_, o, i);
    const int centered = a_.center ? n - 1 : -1;
    const RowFactor<Acc> center = a_.center ? RowFactor<Acc>({a_.center, 0, 0}, s_, o, i) : RowFactor<Acc>();
    T* out = a_.out.data ? row<T>(a_.out, o, i) : nullptr;
    if (!kVectors && mask == nullptr && out != nullptr && centered < 0) {
      constexpr auto kSumRow = sum_rows<P, T, Acc>(std::make_index_sequence<kMaxTerms>());
      return kSumRow[n - 1](term, factor, shift.scalar, relu, out, row_length(s_, i));
    }
    along<P, 4>(row_length(s_, i), [&](int64_t p, auto unroll, auto lanes) {
      constexpr int U = decltype(unroll)::value;
      P sum[U];
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u)
        for (int k = 0; k < P::kVecs; ++k)
          sum[u].v[k] = shift.vector ? Vec::loadu(shift.vector + p + u * P::kLanes + k * P::kWidth) : Vec(shift.scalar);
      for (int j = 0; j < n; ++j) {
        P x[U];
#pragma GCC unroll 4
        for (int u = 0; u < U; ++u) x[u] = load<P>(term[j] + p + u * P::kLanes, lanes);
        if (j == centered) {
#pragma GCC unroll 4
          for (int u = 0; u < U; ++u)
            for (int k = 0; k < P::kVecs; ++k)
              x[u].v[k] = x[u].v[k] -
                  (kVectors ? Vec::loadu(center.vector + p + u * P::kLanes + k * P::kWidth) : Vec(center.scalar));
        }
        const Acc* vector = factor[j].vector;
        const Vec scalar(factor[j].scalar);
#pragma GCC unroll 4
        for (int u = 0; u < U; ++u)
          for (int k = 0; k < P::kVecs; ++k)
            sum[u].v[k] = at::vec::fmadd(
                x[u].v[k], kVectors ? Vec::loadu(vector + p + u * P::kLanes + k * P::kWidth) : scalar, sum[u].v[k]);
      }
      if (relu) {
#pragma GCC unroll 4
        for (int u = 0; u < U; ++u) sum[u] = sum[u].relu();
      }
      if (mask != nullptr) {
#pragma GCC unroll 4
        for (int u = 0; u < U; ++u) store_bits(mask + (p + u * P::kLanes) / 8, sum[u].rounded().passed(), lanes);
      }
      if (out == nullptr) return;
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) store(sum[u], out + p + u * P::kLanes, lanes);
    });
  }

  const Combine& a_;
  const Shape& s_;
  bool vectors_;
  int64_t mask_pitch_;
};

template <typename T>
void run(const Combine& a) {
  const Shape& s = a.shape;
  const int64_t padded = s.padded();
  for_each_unit(s, a.n + 1, [&](int64_t u, int64_t o, int64_t begin, int64_t end) {
    CombineRows<T> rows(a);
    if (a.moments.mean == nullptr) return rows.run(o, begin, end);
    if (s.channels_last) {
      ColumnMoments<T> columns(s, a.moments.mean + u * padded, a.moments.m2 + u * padded);
      const int64_t tile = tile_rows(s);
      for (int64_t i = begin; i < end; i += tile) {
        const int64_t stop = std::min(i + tile, end);
        rows.run(o, i, stop);
        columns.add(row<const T>(a.out, o, i), a.out.inner, stop - i);
      }
      return columns.finish();
    }
    for (int64_t i = begin; i < end; ++i) {
      rows.run(o, i, i + 1);
      const auto m = row_moments(row<const T>(a.out, o, i), s.length);
      a.moments.mean[o * padded + i] = m.mean;
      a.moments.m2[o * padded + i] = m.m2;
    }
  });
}

// The backward of a unit of rows, a tile at a time: each step finds the tile in cache.
template <typename T>
class BackwardRows {
  using P = Pack<T>;
  using Acc = typename P::Acc;
  using Vec = typename P::Vec;

 public:
  BackwardRows(const Backward& a, int64_t u, int64_t o)
      : a_(a), s_(a.shape), u_(u), o_(o), mask_pitch_((s_.length + 7) / 8), padded_(s_.padded()) {
    if (a_.sums == nullptr || !s_.channels_last) return;
    scratch_.resize((1 + a_.n_summed) * padded_);
    for (int k = 0; k <= a_.n_summed; ++k) std::fill_n(sums(k), padded_, 0.0);
  }

  void run(int64_t begin, int64_t end) {
    const int64_t tile = s_.channels_last ? std::min(tile_rows(s_), kBlock) : tile_rows(s_);
    for (int64_t i = begin; i < end; i += tile) {
      const int64_t stop = std::min(i + tile, end);
      uint8_t* mask = a_.mask ? a_.mask + (o_ * s_.inner + i) * mask_pitch_ : nullptr;
      if (a_.sign != nullptr) CombineRows<T>(*a_.sign).run(o_, i, stop, mask);
      if (mask != nullptr) {
        run_tile<true>(i, stop, mask);
      } else {
        run_tile<false>(i, stop, nullptr);
      }
    }
    if (block_ > 0) flush();
  }

 private:
  double* sums(int which) { return a_.sums + (which * s_.partials() + (s_.channels_last ? u_ : o_)) * padded_; }
  Acc* part(int which) { return scratch_.data() + which * padded_; }

  template <bool kMask>
  void run_tile(int64_t begin, int64_t end, const uint8_t* mask) {
    if (a_.sums != nullptr) {
      if (s_.channels_last && block_ + end - begin > kBlock) flush();
      block_ += end - begin;
      // The sum of the gradient comes along with the first product.
      for (int j = a_.n_summed > 0 ? 0 : -1; j < a_.n_summed; ++j) {
        const bool alone = a_.sum_grad && j <= 0;
        s_.channels_last ? sum_columns<kMask>(begin, end, mask, j, alone) : sum_rows<kMask>(begin, end, mask, j, alone);
      }
    }
    for (int k = 0; k < a_.n_outputs; ++k) {
      const uint8_t* bits = mask;
      for (int64_t i = begin; i < end; ++i, bits += kMask ? mask_pitch_ : 0) {
        const bool with_x = k == 0 && a_.x.data != nullptr;
        const RowFactor<Acc> factor(a_.factors[k], s_, o_, i);
        if (factor.vector != nullptr) {
          with_x ? spread<kMask, true, true>(i, k, bits, factor) : spread<kMask, true, false>(i, k, bits, factor);
        } else {
          with_x ? spread<kMask, false, true>(i, k, bits, factor) : spread<kMask, false, false>(i, k, bits, factor);
        }
      }
    }
  }

  template <bool kMask, typename N>
  static P load_grad(const T* grad, const uint8_t* mask, N n) {
    const P g = load<P>(grad, n);
    if constexpr (kMask) return g.masked(load_bits(mask, n));
    return g;
  }

  template <bool kMask>
  void sum_columns(int64_t begin, int64_t end, const uint8_t* mask, int j, bool sum_grad) {
    int64_t i = begin;
    for (; i + 4 <= end; i += 4) add_rows<kMask, 4>(i, mask + (kMask ? (i - begin) * mask_pitch_ : 0), j, sum_grad);
    for (; i < end; ++i) add_rows<kMask, 1>(i, mask + (kMask ? (i - begin) * mask_pitch_ : 0), j, sum_grad);
  }

  template <bool kMask, int R>
  void add_rows(int64_t i, const uint8_t* mask, int j, bool sum_grad) {
    const T *grad[R], *x[R];
    for (int r = 0; r < R; ++r) {
      grad[r] = row<const T>(a_.grad, o_, i + r);
      x[r] = j < 0 ? nullptr : row<const T>(a_.summed[j], o_, i + r);
    }
    const Acc* center = static_cast<const Acc*>(a_.center);
    Acc *plain = part(0), *product = part(1 + j);
    along<P, 1>(s_.length, [&](int64_t p, auto, auto n) {
      P g[R];
      for (int r = 0; r < R; ++r) g[r] = load_grad<kMask>(grad[r] + p, mask + (kMask ? r * mask_pitch_ + p / 8 : 0), n);
      // The rows at hand are summed among themselves first, which keeps the chain of roundings short.
      if (j >= 0) {
        P some;
        for (int r = 0; r < R; ++r) {
          P t = load<P>(x[r] + p, n);
          for (int v = 0; v < P::kVecs; ++v) {
            if (center != nullptr) t.v[v] = t.v[v] - Vec::loadu(center + p + v * P::kWidth);
            some.v[v] = r == 0 ? g[r].v[v] * t.v[v] : at::vec::fmadd(g[r].v[v], t.v[v], some.v[v]);
          }
        }
        for (int v = 0; v < P::kVecs; ++v) {
          Acc* to = product + p + v * P::kWidth;
          (Vec::loadu(to) + some.v[v]).store(to);
        }
      }
      if (!sum_grad) return;
      for (int v = 0; v < P::kVecs; ++v) {
        Acc* to = plain + p + v * P::kWidth;
        Vec some = g[0].v[v];
        for (int r = 1; r < R; ++r) some = some + g[r].v[v];
        (Vec::loadu(to) + some).store(to);
      }
    });
  }

  void flush() {
    if (s_.channels_last && a_.sums != nullptr)
      for (int k = 0; k <= a_.n_summed; ++k) move_to(sums(k), part(k), s_.length);
    block_ = 0;
  }

  template <bool kMask>
  void sum_rows(int64_t begin, int64_t end, const uint8_t* mask, int j, bool sum_grad) {
    constexpr int U = 4;
    constexpr int64_t kRun = 64 * U * P::kLanes;  // elements that Acc sums before double takes over
    for (int64_t i = begin; i < end; ++i, mask += kMask ? mask_pitch_ : 0) {
      const T* grad = row<const T>(a_.grad, o_, i);
      const T* x = j < 0 ? nullptr : row<const T>(a_.summed[j], o_, i);
      const Vec center(a_.center ? static_cast<const Acc*>(a_.center)[i] : Acc(0));
      double plain_all = 0, product_all = 0;
      for (int64_t start = 0; start < s_.length; start += kRun) {
        Vec plain[U * P::kVecs], product[U * P::kVecs];
        for (auto& v : plain) v = Vec(Acc(0));
        for (auto& v : product) v = Vec(Acc(0));
        along<P, U>(std::min(kRun, s_.length - start), [&](int64_t p, auto unroll, auto n) {
#pragma GCC unroll 4
          for (int u = 0; u < decltype(unroll)::value; ++u) {
            const int64_t q = start + p + u * P::kLanes;
            const P g = load_grad<kMask>(grad + q, mask + (kMask ? q / 8 : 0), n);
            for (int v = 0; v < P::kVecs; ++v) plain[u * P::kVecs + v] = plain[u * P::kVecs + v] + g.v[v];
            if (x == nullptr) continue;
            P t = load<P>(x + q, n);
            for (int v = 0; v < P::kVecs; ++v) t.v[v] = t.v[v] - center;
            if constexpr (!kIsFull<decltype(n)>) t = t.masked((1u << n) - 1);
            for (int v = 0; v < P::kVecs; ++v)
              product[u * P::kVecs + v] = at::vec::fmadd(g.v[v], t.v[v], product[u * P::kVecs + v]);
          }
        });
        for (auto& v : plain) plain_all += total(v);
        for (auto& v : product) product_all += total(v);
      }
      if (sum_grad) sums(0)[i] = plain_all;
      if (j >= 0) sums(1 + j)[i] = product_all;
    }
  }

  // outputs_k = factor_k * g', and slope * (x - center) + offset beside it.
  template <bool kMask, bool kVectors, bool kX>
  void spread(int64_t i, int k, const uint8_t* mask, const RowFactor<Acc>& factor) {
    const T* grad = row<const T>(a_.grad, o_, i);
    T* out = row<T>(a_.outputs[k], o_, i);
    const T* x = nullptr;
    RowFactor<Acc> center, slope, offset;
    if constexpr (kX) {
      x = row<const T>(a_.x, o_, i);
      center = RowFactor<Acc>({a_.center, 0, 0}, s_, o_, i);
      slope = RowFactor<Acc>({a_.slope, 0, 0}, s_, o_, i);
      offset = RowFactor<Acc>({a_.offset, 0, 0}, s_, o_, i);
    }
    auto at = [](const RowFactor<Acc>& f, int64_t q) { return kVectors ? Vec::loadu(f.vector + q) : Vec(f.scalar); };
    along<P, 2>(row_length(s_, i), [&](int64_t p, auto unroll, auto n) {
#pragma GCC unroll 2
      for (int u = 0; u < decltype(unroll)::value; ++u) {
        const int64_t q = p + u * P::kLanes;
        P d = load_grad<kMask>(grad + q, mask + (kMask ? q / 8 : 0), n);
        P t;
        if constexpr (kX) t = load<P>(x + q, n);
        for (int v = 0; v < P::kVecs; ++v) {
          const int64_t w = q + v * P::kWidth;
          if constexpr (kX) {
            const Vec correction = at::vec::fmadd(t.v[v] - at(center, w), at(slope, w), at(offset, w));
            d.v[v] = at::vec::fmadd(d.v[v], at(factor, w), correction);
          } else {
            d.v[v] = d.v[v] * at(factor, w);
          }
        }
        store(d, out + q, n);
      }
    });
  }

  const Backward& a_;
  const Shape& s_;
  const int64_t u_, o_, mask_pitch_, padded_;
  int64_t block_ = 0;  // rows in the parts that are not in the sums yet
  std::vector<Acc> scratch_;
};

template <typename T>
void run(const Backward& a) {
  for_each_unit(a.shape, a.n_outputs + a.n_summed + 1, [&](int64_t u, int64_t o, int64_t begin, int64_t end) {
    BackwardRows<T>(a, u, o).run(begin, end);
  });
}

void rk_sum(const Combine& a) {
  with_type(a.dtype, [&](auto t) { run<decltype(t)>(a); });
}

void rk_sum_backward(const Backward& a) {
  with_type(a.dtype, [&](auto t) { run<decltype(t)>(a); });
}

const Enter<Combine> entered(combine, kCapability, rk_sum);
const Enter<Backward> entered_backward(backward, kCapability, rk_sum_backward);

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace rkfast
