#include <ATen/Parallel.h>

#include "cpu/accumulate.h"

namespace rkfast {
inline namespace CPU_CAPABILITY {
namespace {

// One row of out = act(sum_j factor_j * (term_j - center_j) + shift).
template <typename T>
class CombineRow {
  using P = Pack<T>;
  using Acc = typename P::Acc;
  using Vec = typename P::Vec;

 public:
  CombineRow(const Combine& a, int64_t o, int64_t i) : n_(a.n), relu_(a.relu), shift_(a.shift, a.shape, o, i) {
    for (int j = 0; j < n_; ++j) {
      term_[j] = row<const T>(a.terms[j], o, i);
      factor_[j] = RowFactor<Acc>(a.factors[j], a.shape, o, i);
    }
    if (a.center != nullptr) {
      center_ = Factor{a.center, 0, 0};
      center_row_ = RowFactor<Acc>(center_, a.shape, o, i);
      centered_ = n_ - 1;
    }
  }

  void run(T* out, uint8_t* mask, int64_t length) const {
    constexpr int64_t kWide = 4 * P::kLanes;
    int64_t p = 0;
    for (; p + kWide <= length; p += kWide) step<4>(p, out, mask);
    for (; p + P::kLanes <= length; p += P::kLanes) step<1>(p, out, mask);
    if (p < length) step<1>(p, out, mask, static_cast<int>(length - p));
  }

 private:
  template <int U>
  void step(int64_t p, T* out, uint8_t* mask, int n = P::kLanes) const {
    P sum[U];
    for (int u = 0; u < U; ++u)
      for (int k = 0; k < P::kVecs; ++k) sum[u].v[k] = shift_.at(p + u * P::kLanes + k * P::kWidth);
    for (int j = 0; j < n_; ++j) {
      const bool centered = j == centered_;
      for (int u = 0; u < U; ++u) {
        const T* t = term_[j] + p + u * P::kLanes;
        P x = U == 1 && n < P::kLanes ? P::load(t, n) : P::load(t);
        for (int k = 0; k < P::kVecs; ++k) {
          const int64_t at = p + u * P::kLanes + k * P::kWidth;
          if (centered) x.v[k] = x.v[k] - center_row_.at(at);
          sum[u].v[k] = at::vec::fmadd(x.v[k], factor_[j].at(at), sum[u].v[k]);
        }
      }
    }
    for (int u = 0; u < U; ++u) {
      if (relu_) sum[u] = sum[u].relu();
      if (mask != nullptr) store_bits(mask + (p + u * P::kLanes) / 8, sum[u].rounded().passed(), n);
      if (out == nullptr) continue;
      T* to = out + p + u * P::kLanes;
      if (n < P::kLanes) {
        sum[u].store(to, n);
      } else {
        sum[u].store(to);
      }
    }
  }

  int n_, centered_ = -1;
  bool relu_;
  const T* term_[kMaxTerms];
  RowFactor<Acc> factor_[kMaxTerms];
  RowFactor<Acc> shift_;
  Factor center_;
  RowFactor<Acc> center_row_;
};

inline int64_t row_length(const Shape& s, int64_t i) { return i == s.inner - 1 ? s.last : s.length; }

template <typename T>
void run(const Combine& a) {
  const Shape& s = a.shape;
  const int64_t padded = s.padded(), mask_pitch = (s.length + 7) / 8;
  for_each_unit(s, a.n + 1, [&](int64_t u, int64_t o, int64_t begin, int64_t end) {
    auto combine_rows = [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i)
        CombineRow<T>(a, o, i).run(
            row<T>(a.out, o, i), a.mask ? a.mask + (o * s.inner + i) * mask_pitch : nullptr, row_length(s, i));
    };
    if (a.moments.mean == nullptr) return combine_rows(begin, end);
    if (s.channels_last) {
      ColumnMoments<T> columns(s, a.moments.mean + u * padded, a.moments.m2 + u * padded);
      const int64_t tile = tile_rows(s);
      for (int64_t i = begin; i < end; i += tile) {
        const int64_t stop = std::min(i + tile, end);
        combine_rows(i, stop);
        columns.add(row<const T>(a.out, o, i), a.out.inner, stop - i);
      }
      return columns.finish();
    }
    for (int64_t i = begin; i < end; ++i) {
      combine_rows(i, i + 1);
      const auto m = row_moments(row<const T>(a.out, o, i), s.length);
      a.moments.mean[o * padded + i] = m.mean;
      a.moments.m2[o * padded + i] = m.m2;
    }
  });
}

// Rows of the gradient where the mask is set, a tile of a unit at a time.
template <typename T>
class BackwardUnit {
  using P = Pack<T>;
  using Acc = typename P::Acc;
  using Vec = typename P::Vec;
  static constexpr int64_t kBlock = 64;  // rows that Acc sums before double takes over

 public:
  BackwardUnit(const Backward& a, int64_t u, int64_t o)
      : a_(a), s_(a.shape), o_(o), mask_pitch_((s_.length + 7) / 8), padded_(s_.padded()) {
    if (a.sums == nullptr) return;
    if (a.sum_grad) column_[n_columns_] = -1, sums_[n_columns_++] = sums_of(0, u);
    for (int j = 0; j < a.n_summed; ++j) column_[n_columns_] = j, sums_[n_columns_++] = sums_of(1 + j, u);
    if (!s_.channels_last) return;
    for (int k = 0; k < n_columns_; ++k) std::fill(sums_[k], sums_[k] + padded_, 0.0);
    scratch_.resize(n_columns_ * padded_);
  }

  void run(int64_t begin, int64_t end) {
    const int64_t tile = tile_rows(s_);
    for (int64_t i = begin; i < end; i += tile) {
      const int64_t stop = std::min(i + tile, end);
      mask_ = a_.mask ? a_.mask + (o_ * s_.inner + i) * mask_pitch_ : nullptr;
      if (a_.sign != nullptr) recompute_mask(i, stop);
      first_ = i;
      if (n_columns_ > 0) s_.channels_last ? sum_columns(i, stop) : sum_rows(i, stop);
      if (a_.n_outputs > 0)
        for (int64_t r = i; r < stop; ++r) spread(r);
    }
    if (block_ > 0) flush();
  }

 private:
  double* sums_of(int which, int64_t u) {
    return a_.sums + (which * s_.partials() + (s_.channels_last ? u : o_)) * padded_;
  }

  void recompute_mask(int64_t begin, int64_t end) {
    bits_.resize((end - begin) * mask_pitch_);
    for (int64_t i = begin; i < end; ++i)
      CombineRow<T>(*a_.sign, o_, i).run(nullptr, bits_.data() + (i - begin) * mask_pitch_, row_length(s_, i));
    mask_ = bits_.data();
  }

  const uint8_t* mask_row(int64_t i) const { return mask_ ? mask_ + (i - first_) * mask_pitch_ : nullptr; }

  static P load(const T* x, int64_t p, int n) { return n < P::kLanes ? P::load(x + p, n) : P::load(x + p); }

  P load_grad(const T* grad, const uint8_t* mask, int64_t p, int n) const {
    const P g = load(grad, p, n);
    return mask ? g.masked(load_bits(mask + p / 8, n)) : g;
  }

  void sum_columns(int64_t begin, int64_t end) {
    int64_t i = begin;
    while (i < end) {
      const int64_t stop = std::min(end, i + kBlock - block_);
      block_ += stop - i;
      for (; i + 4 <= stop; i += 4) add_rows<4>(i);
      for (; i < stop; ++i) add_rows<1>(i);
      if (block_ == kBlock) flush();
    }
  }

  template <int R>
  void add_rows(int64_t i) {
    int64_t p = 0;
    for (; p + P::kLanes <= s_.length; p += P::kLanes) add_columns<R>(i, p, P::kLanes);
    if (p < s_.length) add_columns<R>(i, p, static_cast<int>(s_.length - p));
  }

  template <int R>
  void add_columns(int64_t i, int64_t p, int n) {
    P g[R];
    for (int r = 0; r < R; ++r) g[r] = load_grad(row<const T>(a_.grad, o_, i + r), mask_row(i + r), p, n);
    for (int k = 0; k < n_columns_; ++k) {
      Acc* sum = scratch_.data() + k * padded_ + p;
      const int j = column_[k];
      // The rows at hand are summed among themselves first, which keeps the chain of roundings short.
      P some = g[0];
      for (int r = 0; r < R; ++r) {
        if (j < 0) {
          if (r > 0)
            for (int v = 0; v < P::kVecs; ++v) some.v[v] = some.v[v] + g[r].v[v];
          continue;
        }
        P x = load(row<const T>(a_.summed[j], o_, i + r), p, n);
        for (int v = 0; v < P::kVecs; ++v) {
          if (a_.center) x.v[v] = x.v[v] - Vec::loadu(static_cast<const Acc*>(a_.center) + p + v * P::kWidth);
          some.v[v] = r == 0 ? g[r].v[v] * x.v[v] : at::vec::fmadd(g[r].v[v], x.v[v], some.v[v]);
        }
      }
      for (int v = 0; v < P::kVecs; ++v) (Vec::loadu(sum + v * P::kWidth) + some.v[v]).store(sum + v * P::kWidth);
    }
  }

  void flush() {
    for (int k = 0; k < n_columns_; ++k) {
      Acc* sum = scratch_.data() + k * padded_;
      for (int64_t c = 0; c < s_.length; ++c) {
        sums_[k][c] += sum[c];
        sum[c] = 0;
      }
    }
    block_ = 0;
  }

  void sum_rows(int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T* grad = row<const T>(a_.grad, o_, i);
      for (int k = 0; k < n_columns_; ++k) {
        const int j = column_[k];
        const T* x = j < 0 ? nullptr : row<const T>(a_.summed[j], o_, i);
        const Vec center(a_.center ? static_cast<const Acc*>(a_.center)[i] : Acc(0));
        double whole = 0;
        for (int64_t start = 0; start < s_.length; start += kBlock * P::kLanes) {
          const int64_t stop = std::min(start + kBlock * P::kLanes, s_.length);
          Vec sum[P::kVecs];
          for (auto& v : sum) v = Vec(Acc(0));
          for (int64_t p = start; p < stop; p += P::kLanes) {
            const int n = static_cast<int>(std::min<int64_t>(P::kLanes, stop - p));
            P g = load_grad(grad, mask_row(i), p, n);
            if (x != nullptr) {
              const P t = load(x, p, n);
              for (int v = 0; v < P::kVecs; ++v) g.v[v] = g.v[v] * (t.v[v] - center);
              if (n < P::kLanes) g = g.masked((1u << n) - 1);
            }
            for (int v = 0; v < P::kVecs; ++v) sum[v] = sum[v] + g.v[v];
          }
          for (auto& v : sum) whole += total(v);
        }
        sums_[k][i] = whole;
      }
    }
  }

  void spread(int64_t i) {
    const T* grad = row<const T>(a_.grad, o_, i);
    const uint8_t* mask = mask_row(i);
    const T* x = a_.x.data ? row<const T>(a_.x, o_, i) : nullptr;
    RowFactor<Acc> center, slope, offset, factor[kMaxTerms];
    if (x != nullptr) {
      center = RowFactor<Acc>({a_.center, 0, 0}, s_, o_, i);
      slope = RowFactor<Acc>({a_.slope, 0, 0}, s_, o_, i);
      offset = RowFactor<Acc>({a_.offset, 0, 0}, s_, o_, i);
    }
    T* out[kMaxTerms];
    for (int k = 0; k < a_.n_outputs; ++k) {
      out[k] = row<T>(a_.outputs[k], o_, i);
      factor[k] = RowFactor<Acc>(a_.factors[k], s_, o_, i);
    }
    const int64_t length = row_length(s_, i);
    for (int64_t p = 0; p < length; p += P::kLanes) {
      const int n = static_cast<int>(std::min<int64_t>(P::kLanes, length - p));
      const P g = load_grad(grad, mask, p, n);
      for (int k = 0; k < a_.n_outputs; ++k) {
        P d;
        for (int v = 0; v < P::kVecs; ++v) d.v[v] = g.v[v] * factor[k].at(p + v * P::kWidth);
        if (k == 0 && x != nullptr) {
          const P t = load(x, p, n);
          for (int v = 0; v < P::kVecs; ++v) {
            const int64_t at = p + v * P::kWidth;
            d.v[v] = d.v[v] + at::vec::fmadd(t.v[v] - center.at(at), slope.at(at), offset.at(at));
          }
        }
        if (n < P::kLanes) {
          d.store(out[k] + p, n);
        } else {
          d.store(out[k] + p);
        }
      }
    }
  }

  const Backward& a_;
  const Shape& s_;
  const int64_t o_, mask_pitch_, padded_;
  int64_t block_ = 0, first_ = 0;
  int n_columns_ = 0;
  int column_[kMaxTerms + 1];
  double* sums_[kMaxTerms + 1];
  std::vector<Acc> scratch_;
  std::vector<uint8_t> bits_;
  const uint8_t* mask_ = nullptr;
};

template <typename T>
void run(const Backward& a) {
  for_each_unit(a.shape, a.n_outputs + a.n_summed + 1, [&](int64_t u, int64_t o, int64_t begin, int64_t end) {
    BackwardUnit<T>(a, u, o).run(begin, end);
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
