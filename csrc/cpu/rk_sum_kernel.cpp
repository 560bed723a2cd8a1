#include <array>
#include <utility>

#include "cpu/accumulate.h"

namespace rkfast {
inline namespace CPU_CAPABILITY {
namespace {

inline int64_t row_length(const Shape& s, int64_t i) { return i == s.inner - 1 ? s.last : s.length; }

// What a row of CombineRows is made of.
template <typename T, typename Acc>
struct CombineRow {
  int n;
  const T* terms[kMaxTerms];
  RowFactor<Acc> factors[kMaxTerms];
  RowFactor<Acc> shift, center;
  bool relu, centered, stream;
  T* out;         // or null
  uint8_t* mask;  // or null
  int64_t length;
};

// Registers whose bits of a mask are stored at once: a store of two bytes between those of the results takes as much room
// among the stores under way as these do.
template <typename P>
constexpr int kTogether = P::kLanes == 32 ? 2 : 4;

enum class Center { kNone, kScalar, kVector };  // of the last term; kVector: its factor and the shift are vectors, too

// A row whose number of terms is known, so that pointers and factors stay in registers: they need not be read again
// after each store.
template <typename P, int N, Center C, typename T, typename Acc>
void combine_row(const CombineRow<T, Acc>& row) {
  using Vec = typename P::Vec;
  constexpr bool kVector = C == Center::kVector;
  const T* terms[N];
  Vec factors[N];
  for (int j = 0; j < N; ++j) {
    terms[j] = row.terms[j];
    factors[j] = Vec(row.factors[j].scalar);
  }
  const Acc *scales = row.factors[N - 1].vector, *shifts = row.shift.vector, *centers = row.center.vector;
  const Vec shift(row.shift.scalar), center(row.center.scalar);
  const bool relu = row.relu, stream = row.stream;
  T* const out = row.out;
  uint8_t* const mask = row.mask;
  along<P, kTogether<P>>(row.length, [&](int64_t p, auto unroll, auto lanes) {
    uint64_t passed = 0;
#pragma GCC unroll 4
    for (int u = 0; u < decltype(unroll)::value; ++u) {
      const int64_t q = p + u * P::kLanes;
      P sum;
      for (int k = 0; k < P::kVecs; ++k) sum.v[k] = kVector && shifts ? Vec::loadu(shifts + q + k * P::kWidth) : shift;
#pragma GCC unroll 17
      for (int j = 0; j < N; ++j) {
        const P x = load<P>(terms[j] + q, lanes);
        for (int k = 0; k < P::kVecs; ++k) {
          const int64_t w = q + k * P::kWidth;
          if (kVector && j == N - 1) {
            sum.v[k] = at::vec::fmadd(x.v[k] - Vec::loadu(centers + w), Vec::loadu(scales + w), sum.v[k]);
          } else if (C == Center::kScalar && j == N - 1) {
            sum.v[k] = at::vec::fmadd(x.v[k] - center, factors[j], sum.v[k]);
          } else {
            sum.v[k] = at::vec::fmadd(x.v[k], factors[j], sum.v[k]);
          }
        }
      }
      if (relu) sum = sum.relu();
      if (mask != nullptr) passed |= static_cast<uint64_t>(sum.rounded().passed()) << (u * P::kLanes);
      if (out != nullptr) store(sum, out + q, lanes, stream);
    }
    if (mask != nullptr) store_bits(mask + p / 8, passed, unroll, lanes);
  });
}

template <typename P, Center C, typename T, typename Acc, size_t... N>
constexpr auto combine_rows(std::index_sequence<N...>) {
  return std::array{&combine_row<P, static_cast<int>(N) + 1, C, T, Acc>...};
}

// Any number of terms, with vectors or without.
template <typename P, typename T, typename Acc>
void combine_row_of_vectors(const CombineRow<T, Acc>& row) {
  using Vec = typename P::Vec;
  along<P, kTogether<P>>(row.length, [&](int64_t p, auto unroll, auto lanes) {
    uint64_t passed = 0;
#pragma GCC unroll 4
    for (int u = 0; u < decltype(unroll)::value; ++u) {
      const int64_t q = p + u * P::kLanes;
      auto at = [&](const RowFactor<Acc>& f, int k) {
        return f.vector ? Vec::loadu(f.vector + q + k * P::kWidth) : Vec(f.scalar);
      };
      P sum;
      for (int k = 0; k < P::kVecs; ++k) sum.v[k] = at(row.shift, k);
      for (int j = 0; j < row.n; ++j) {
        const P x = load<P>(row.terms[j] + q, lanes);
        const bool centered = j == row.n - 1 && row.centered;
        for (int k = 0; k < P::kVecs; ++k) {
          const Vec d = centered ? x.v[k] - at(row.center, k) : x.v[k];
          sum.v[k] = at::vec::fmadd(d, at(row.factors[j], k), sum.v[k]);
        }
      }
      if (row.relu) sum = sum.relu();
      if (row.mask != nullptr) passed |= static_cast<uint64_t>(sum.rounded().passed()) << (u * P::kLanes);
      if (row.out != nullptr) store(sum, row.out + q, lanes, row.stream);
    }
    if (row.mask != nullptr) store_bits(row.mask + p / 8, passed, unroll, lanes);
  });
}

// The bits of a mask, where rows are joined that do not fill their bytes: in memory each row begins with a byte, while
// the loops want those of joined rows without gaps.
class MaskRows {
 public:
  explicit MaskRows(const Shape& s)
      : rows_(s.replicas), words_(s.length / rows_ / 32), tail_(static_cast<int>(s.length / rows_ % 32)),
        pitch_(rows_ * ((s.length / rows_ + 7) / 8)), joined_((s.length + 7) / 8) {}

  int64_t pitch() const { return pitch_; }    // of joined rows in memory
  int64_t joined() const { return joined_; }  // without gaps
  bool have_gaps() const { return rows_ > 1 && tail_ % 8 != 0; }

  // One joined row; `to` has room for four bytes more.
  void join(const uint8_t* from, uint8_t* to) const {
    uint64_t bits = 0;
    int have = 0;  // fewer than 32
    auto append = [&](uint32_t some, int n) {
      bits |= static_cast<uint64_t>(some) << have;
      if ((have += n) < 32) return;
      std::memcpy(to, &bits, 4);
      to += 4, bits >>= 32, have -= 32;
    };
    for (int64_t r = 0; r < rows_; ++r) {
      for (int64_t w = 0; w < words_; ++w, from += 4) {
        uint32_t some;
        std::memcpy(&some, from, 4);
        append(some, 32);
      }
      for (int left = tail_; left > 0; left -= 8) append(*from++ & ((1u << std::min(left, 8)) - 1), std::min(left, 8));
    }
    std::memcpy(to, &bits, 4);
  }

  // The way back; four bytes behind the joined row are read.
  void split(const uint8_t* from, uint8_t* to) const {
    uint64_t bits = 0;
    int have = 0;
    auto next = [&](int n) {
      if (have < n) {
        uint32_t more;
        std::memcpy(&more, from, 4);
        bits |= static_cast<uint64_t>(more) << have;
        from += 4, have += 32;
      }
      const auto some = static_cast<uint32_t>(bits & ((uint64_t(1) << n) - 1));
      bits >>= n, have -= n;
      return some;
    };
    for (int64_t r = 0; r < rows_; ++r) {
      for (int64_t w = 0; w < words_; ++w, to += 4) {
        const uint32_t some = next(32);
        std::memcpy(to, &some, 4);
      }
      for (int left = tail_; left > 0; left -= 8) *to++ = static_cast<uint8_t>(next(std::min(left, 8)));
    }
  }

 private:
  int64_t rows_, words_;
  int tail_;
  int64_t pitch_, joined_;
};

// Rows of out = act(sum_j factor_j * (term_j - center_j) + shift), all terms of a few registers at a time.
template <typename T>
class CombineRows {
  using P = Pack<T>;
  using Acc = typename P::Acc;

 public:
  explicit CombineRows(const Combine& a) : a_(a), s_(a.shape), bits_(s_) {
    const bool last = a.n > 0 && a.factors[a.n - 1].vector != nullptr;
    bool others = false;
    for (int j = 0; j + 1 < a.n; ++j) others |= a.factors[j].vector != nullptr;
    static constexpr auto kPlain = combine_rows<P, Center::kNone, T, Acc>(std::make_index_sequence<kMany>());
    static constexpr auto kScalar = combine_rows<P, Center::kScalar, T, Acc>(std::make_index_sequence<kFew>());
    static constexpr auto kVector = combine_rows<P, Center::kVector, T, Acc>(std::make_index_sequence<kFew>());
    row_ = combine_row_of_vectors<P, T, Acc>;
    if (s_.channels_last && (last || others || a.shift.vector)) {
      if (!others && a.center != nullptr && a.n <= kFew) row_ = kVector[a.n - 1];
    } else if (a.center == nullptr) {
      if (a.n <= kMany) row_ = kPlain[a.n - 1];
    } else if (a.n <= kFew) {
      row_ = kScalar[a.n - 1];
    }
  }

  // The mask of the rows begins at `mask` where it is not the call's own.
  void run(int64_t o, int64_t begin, int64_t end, uint8_t* mask = nullptr) const {
    if (mask == nullptr && a_.mask != nullptr) mask = a_.mask + (o * s_.inner + begin) * bits_.pitch();
    uint8_t joined[kJoined / 4 + 4];  // a joined row is shorter than 2 * kJoined
    const bool split = mask != nullptr && bits_.have_gaps();
    CombineRow<T, Acc> r{};
    r.n = a_.n;
    r.relu = a_.relu;
    r.centered = a_.center != nullptr;
    for (int64_t i = begin; i < end; ++i, mask += mask ? bits_.pitch() : 0) {
      for (int j = 0; j < a_.n; ++j) {
        r.terms[j] = row<const T>(a_.terms[j], o, i);
        r.factors[j] = RowFactor<Acc>(a_.factors[j], s_, o, i);
      }
      r.shift = RowFactor<Acc>(a_.shift, s_, o, i);
      if (r.centered) r.center = RowFactor<Acc>({a_.center, 0, 0}, s_, o, i);
      r.out = a_.out.data ? row<T>(a_.out, o, i) : nullptr;
      r.stream = a_.stream && on_line(r.out);
      r.mask = split ? joined : mask;
      r.length = row_length(s_, i);
      row_(r);
      if (split) bits_.split(joined, mask);
    }
  }

 private:
  // Terms with loops of their own: of float as many as there are, and few beside a BatchNorm.
  static constexpr int kMany = std::is_same_v<T, float> ? kMaxTerms : 6, kFew = 3;

  const Combine& a_;
  const Shape& s_;
  const MaskRows bits_;
  void (*row_)(const CombineRow<T, Acc>&);
};

template <typename T>
void run(const Combine& a) {
  const Shape& s = a.shape;
  const int64_t padded = s.padded();
  for_each_unit(s, a.n + 1, [&](int64_t u, int64_t o, int64_t begin, int64_t end) {
    CombineRows<T> rows(a);
    if (a.moments.mean == nullptr) {
      rows.run(o, begin, end);
      return fence_streams();
    }
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
      : a_(a), s_(a.shape), bits_(s_), u_(u), o_(o), mask_pitch_(bits_.joined()), padded_(s_.padded()) {
    if (a_.sums == nullptr || !s_.channels_last) return;
    scratch_.resize((1 + a_.n_summed) * padded_);
    for (int k = 0; k <= a_.n_summed; ++k) std::fill_n(sums(k), padded_, 0.0);
  }

  void run(int64_t begin, int64_t end) {
    uint8_t joined[kTile / 8 + kBlock + 4];  // of at most kBlock joined rows, each of whole bytes
    const int64_t tile = s_.channels_last ? std::min(tile_rows(s_), kBlock) : tile_rows(s_);
    for (int64_t i = begin; i < end; i += tile) {
      const int64_t stop = std::min(i + tile, end);
      uint8_t* mask = a_.mask ? a_.mask + (o_ * s_.inner + i) * bits_.pitch() : nullptr;
      if (a_.sign != nullptr) CombineRows<T>(*a_.sign).run(o_, i, stop, mask);
      if (mask != nullptr && bits_.have_gaps()) {
        for (int64_t k = i; k < stop; ++k) bits_.join(mask + (k - i) * bits_.pitch(), joined + (k - i) * bits_.joined());
        mask = joined;
      }
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
    // An output with a vector of its own, or with an x, and up to two scalar ones beside it in one go.
    for (int k = 0; k < a_.n_outputs;) {
      int n = 1;
      while (n < 3 && k + n < a_.n_outputs && a_.factors[k + n].vector == nullptr) ++n;
      const bool with_x = k == 0 && a_.x.data != nullptr;
      n == 1 ? spread_rows<kMask, 1>(begin, end, k, mask, with_x)
             : n == 2 ? spread_rows<kMask, 2>(begin, end, k, mask, with_x) : spread_rows<kMask, 3>(begin, end, k, mask, with_x);
      k += n;
    }
  }

  template <bool kMask, int N>
  void spread_rows(int64_t begin, int64_t end, int k, const uint8_t* mask, bool with_x) {
    const bool vectors = s_.channels_last && a_.factors[k].vector != nullptr;
    for (int64_t i = begin; i < end; ++i, mask += kMask ? mask_pitch_ : 0) {
      if (vectors) {
        with_x ? spread<kMask, N, true, true>(i, k, mask) : spread<kMask, N, true, false>(i, k, mask);
      } else {
        with_x ? spread<kMask, N, false, true>(i, k, mask) : spread<kMask, N, false, false>(i, k, mask);
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
    const int64_t grad_pitch = a_.grad.inner, x_pitch = j < 0 ? 0 : a_.summed[j].inner;
    const Acc* center = static_cast<const Acc*>(a_.center);
    Acc *plain = part(0), *product = part(1 + j);
    along<P, 1>(s_.length, [&](int64_t p, auto, auto n) {
      P g[R];
      for (int r = 0; r < R; ++r) g[r] = load_grad<kMask>(grad[r] + p, mask + (kMask ? r * mask_pitch_ + p / 8 : 0), n);
      // Several rows at once are more streams than the processor foresees.
      for (int r = 0; r < R; ++r) {
        __builtin_prefetch(grad[r] + p + R * grad_pitch);
        if (x[r] != nullptr) __builtin_prefetch(x[r] + p + R * x_pitch);
      }
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
        plain_all += total(plain);
        product_all += total(product);
      }
      if (sum_grad) sums(0)[i] = plain_all;
      if (j >= 0) sums(1 + j)[i] = product_all;
    }
  }

  // outputs_k = factor_k * g' for N outputs from `first` on, and slope * (x - center) + offset beside the first of them.
  template <bool kMask, int N, bool kVectors, bool kX>
  void spread(int64_t i, int first, const uint8_t* mask) {
    const T* const grad = row<const T>(a_.grad, o_, i);
    T* out[N];
    Vec factors[N];
    for (int k = 0; k < N; ++k) {
      out[k] = row<T>(a_.outputs[first + k], o_, i);
      factors[k] = Vec(RowFactor<Acc>(a_.factors[first + k], s_, o_, i).scalar);
    }
    bool stream = a_.stream;
    for (int k = 0; k < N; ++k) stream = stream && on_line(out[k]);
    const RowFactor<Acc> factor(a_.factors[first], s_, o_, i);
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
        const P g = load_grad<kMask>(grad + q, mask + (kMask ? q / 8 : 0), n);
        P d;
        if constexpr (kX) d = load<P>(x + q, n);
        for (int v = 0; v < P::kVecs; ++v) {
          const int64_t w = q + v * P::kWidth;
          if constexpr (kX) {
            d.v[v] = at::vec::fmadd(d.v[v] - at(center, w), at(slope, w), at(offset, w));
            d.v[v] = at::vec::fmadd(g.v[v], at(factor, w), d.v[v]);
          } else {
            d.v[v] = g.v[v] * at(factor, w);
          }
        }
        store(d, out[0] + q, n, stream);
#pragma GCC unroll 2
        for (int k = 1; k < N; ++k) {
          for (int v = 0; v < P::kVecs; ++v) d.v[v] = g.v[v] * factors[k];
          store(d, out[k] + q, n, stream);
        }
      }
    });
  }

  const Backward& a_;
  const Shape& s_;
  const MaskRows bits_;
  const int64_t u_, o_, mask_pitch_, padded_;
  int64_t block_ = 0;  // rows in the parts that are not in the sums yet
  Aligned<Acc> scratch_;
};

template <typename T>
void run(const Backward& a) {
  for_each_unit(a.shape, a.n_outputs + a.n_summed + 1, [&](int64_t u, int64_t o, int64_t begin, int64_t end) {
    BackwardRows<T>(a, u, o).run(begin, end);
    fence_streams();
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
