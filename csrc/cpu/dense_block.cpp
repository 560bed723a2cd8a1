#include "cpu/convolution.h"

namespace rkfast {

namespace {

constexpr int64_t kColumns = 256;  // channels that a tile of the backward takes at once

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// Rows as the right side of a product in bfloat16: in pairs.
void pair(Slot<const at::BFloat16> x, int64_t rows, int64_t channels, at::BFloat16* out) {
  pair_rows({{reinterpret_cast<const uint16_t*>(x.data), x.pitch}, rows, channels, {reinterpret_cast<uint32_t*>(out), channels}});
}
// Rows turned, as the left side of one: out [channels][out.pitch].
void turn(Slot<const at::BFloat16> x, int64_t rows, int64_t channels, Slot<at::BFloat16> out, at::BFloat16* pairs) {
  pair(x, rows, channels, pairs);
  transpose_rows({{reinterpret_cast<const float*>(pairs), channels}, even(rows) / 2, channels, {reinterpret_cast<float*>(out.data), out.pitch / 2}});
}

struct Unit {  // one growth
  Range reads[2];
  int64_t write, growth, width;  // width: of the bottleneck, or 0
  Tensor conv1, conv2;
  Optional norm1[4], norm2[4];  // weight, bias, mean, var; no mean and var: those of the batch
  Optional keep1, keep2;
  double eps1, eps2;

  int64_t read() const { return reads[0].size() + reads[1].size(); }
};

template <typename T>
class Block : Convolutions<T> {
  using Base = Convolutions<T>;
  using Base::kFloat, Base::n_, Base::h_, Base::w_, Base::rows_, Base::parts_, Base::options_, Base::normalised_;
  using Base::empty_nhwc, Base::room, Base::materialised, Base::materialise, Base::by_tiles, Base::by_neighbours, Base::convolve_by_neighbours, Base::turned, Base::tile_weight, Base::convolve,
      Base::convolve_by_tiles, Base::conv_backward, Base::take_moments_of, Base::total, Base::as_tensor;
  using typename Base::Sums;
  static constexpr at::ScalarType kDType = c10::CppTypeToScalarType<T>::value;

 public:
  Block(const Tensor& x, const std::vector<Tensor>& conv1, const std::vector<Tensor>& conv2,
        const std::vector<Optional>& norms, const std::vector<Optional>& keeps, double keep_scale,
        const std::vector<int64_t>& reads, const std::vector<int64_t>& writes, const std::vector<double>& eps,
        int64_t inputs, int64_t channels, const std::vector<int64_t>& summed)
      : Base(x), inputs_(inputs), channels_(channels), keep_scale_(static_cast<float>(keep_scale)), summed_(summed) {
    const size_t units = conv1.size();
    const bool neck = !conv2.empty();
    const size_t norms_each = neck ? 8 : 4, convs = neck ? 2 : 1;
    TORCH_CHECK_VALUE(x.is_cpu() && x.scalar_type() == kDType && x.dim() == 4, "x: expected a ", kDType, " CPU tensor [N, C, H, W]");
    TORCH_CHECK_VALUE((!neck || conv2.size() == units) && norms.size() == units * norms_each && writes.size() == units &&
                          reads.size() == 4 * units && eps.size() == units * convs &&
                          (keeps.empty() || keeps.size() == units * convs),
                      "conv1, conv2, norms, keeps, reads, writes, eps: lengths do not fit each other");
    int64_t known = inputs;
    for (size_t i = 0; i < units; ++i) {
      Unit u{{{reads[4 * i], reads[4 * i + 1]}, {reads[4 * i + 2], reads[4 * i + 3]}}, writes[i], 0, 0, weight(conv1[i]), {}, {}, {}, {}, {},
             eps[i * convs], neck ? eps[i * convs + 1] : 0};
      if (neck) u.conv2 = weight(conv2[i]);
      u.growth = (neck ? u.conv2 : u.conv1).size(0);
      u.width = neck ? u.conv1.size(0) : 0;
      for (const Range& r : u.reads)
        TORCH_CHECK_VALUE(0 <= r.begin && r.begin <= r.end && r.end <= known, "reads: a slot that is not written yet");
      TORCH_CHECK_VALUE(u.write == known && u.write + u.growth <= channels, "writes: slots are written in their order");
      known += u.growth;
      TORCH_CHECK_VALUE(u.conv1.size(1) == u.read() && (!neck || (u.conv2.size(1) == u.width && u.conv1.size(2) == 1 && u.conv1.size(3) == 1)),
                        "conv1, conv2: channels do not fit the slots that are read");
      for (size_t k = 0; k < 4; ++k) {
        u.norm1[k] = vector("norms", norms[i * norms_each + k], u.read());
        if (neck) u.norm2[k] = vector("norms", norms[i * norms_each + 4 + k], u.width);
      }
      if (!keeps.empty()) {
        u.keep1 = mask(keeps[i * convs], u.conv1.size(0));
        if (neck) u.keep2 = mask(keeps[i * convs + 1], u.growth);
      }
      units_.push_back(u);
    }
    TORCH_CHECK_VALUE(known == channels, "channels: ", channels, " where input and growths have ", known);
    for (int64_t s : summed) TORCH_CHECK_VALUE(s >= 0 && s + inputs <= channels, "summed: outside of the slots");
  }

  std::vector<Tensor> forward(const Tensor& x, const Optional& mean, const Optional& var, bool keep,
                              bool total_moments) {
    TORCH_CHECK_VALUE(x.size(1) == inputs_, "x: expected ", inputs_, " channels");
    buffer_ = empty_nhwc(channels_);
    x_ = buffer_.template data_ptr<T>();
    moments_ = Moment(channels_, buffer_);
    wanted_ = keep || total_moments;
    for (const Unit& u : units_) wanted_ = wanted_ || !u.norm1[2];
    if (!wanted_) {
      moments_.mean.zero_();
      moments_.var.zero_();
    }
    buffer_.narrow(1, 0, inputs_).copy_(x);
    if (mean) {
      TORCH_CHECK_VALUE(mean->numel() == inputs_ && var && var->numel() == inputs_, "mean, var: expected ", inputs_, " values");
      moments_.mean.narrow(0, 0, inputs_).copy_(*mean);
      moments_.var.narrow(0, 0, inputs_).copy_(*var);
    } else {
      take_moments(0, inputs_);
    }
    std::vector<Tensor> mid_moments, mids;
    for (const Unit& u : units_) {
      const Read read = fold(u.norm1, u.read(), u.eps1, [&](auto&& each) { slot_moments(u, each); });
      if (u.width == 0) {
        const int64_t channels = u.read();
        auto load = [&](int64_t row, int64_t n, Slot<T> out) { normalise(u, read, {0, channels}, row, n, out); };
        grow(u, u.conv1, channels, load, u.keep1);
        continue;
      }
      if (!keep && u.norm2[2]) {
        grow_at_once(u, read, fold(u.norm2, u.width, u.eps2, [](auto&&) {}));
        continue;
      }
      Moment moments(u.width, buffer_);
      const Tensor mid = keep ? empty_nhwc(u.width) : Tensor();
      T* b = keep ? mid.template data_ptr<T>() : materialised(mid_, u.width);
      bottleneck(u, read, b, &moments);
      if (u.norm2[2].has_value()) {
        moments.mean.copy_(*u.norm2[2]);
        moments.var.copy_(*u.norm2[3]);
      }
      const Read read2 = fold(u.norm2, u.width, u.eps2, [&](auto&& each) { each(moments, 0, u.width); });
      mid_moments.insert(mid_moments.end(), {moments.mean, moments.var});
      if (keep) mids.push_back(mid);
      auto load = [&](int64_t row, int64_t n, Slot<T> out) {
        normalise_rows<T, T>({{b + row * u.width, u.width}, n, u.width, read2.scale.data(), read2.shift.data(), out});
      };
      grow(u, u.conv2, u.width, load, u.keep2);
    }
    std::vector<Tensor> result{buffer_, moments_.mean, moments_.var};
    if (!keep) mid_moments.clear();
    result.insert(result.end(), mid_moments.begin(), mid_moments.end());
    result.insert(result.end(), mids.begin(), mids.end());
    if (!summed_.empty()) {
      std::vector<Tensor> terms{buffer_.narrow(1, 0, inputs_)};
      for (int64_t s : summed_) terms.push_back(buffer_.narrow(1, s, inputs_));
      const std::vector<Tensor> total = sum(terms, total_moments);
      result.insert(result.end(), total.begin(), total.end());
    }
    return result;
  }

  // dx, and of each unit the gradients of its first convolution, weight and bias, and of its second ones.
  std::vector<Tensor> backward(const Tensor& grad, const Tensor& buffer, const Tensor& mean, const Tensor& var,
                               const std::vector<Tensor>& mid_moments, const std::vector<Tensor>& mids) {
    buffer_ = buffer;
    TORCH_CHECK_VALUE(buffer.is_contiguous(at::MemoryFormat::ChannelsLast) && buffer.size(1) == channels_, "buffer: not this block's");
    x_ = buffer_.template data_ptr<T>();
    moments_.mean = mean.contiguous();
    moments_.var = var.contiguous();
    total_ = at::empty(buffer.sizes(), options_.dtype(at::kFloat).memory_format(at::MemoryFormat::ChannelsLast));
    if (summed_.empty()) {
      total_.copy_(grad);
    } else {
      for (const Range& gap : outside_summed()) total_.narrow(1, gap.begin, gap.size()).zero_();
      total_.narrow(1, 0, inputs_).copy_(grad);
      for (int64_t s : summed_) total_.narrow(1, s, inputs_).copy_(grad);
    }
    s1_.assign(channels_, 0);
    s2_.assign(channels_, 0);
    std::vector<std::vector<Tensor>> found(units_.size());
    for (size_t i = units_.size(); i-- > 0;) {
      const Unit& u = units_[i];
      const size_t m = 2 * i;
      found[i] = u.width == 0 ? plain_backward(u)
                              : bottleneck_backward(u, mid_moments.at(m), mid_moments.at(m + 1), mids.empty() ? Tensor() : mids.at(i));
    }
    Tensor dx = empty_nhwc(inputs_);
    finish_slot({0, inputs_}, std::nullopt, dx.template data_ptr<T>());
    std::vector<Tensor> result{dx};
    for (auto& f : found) result.insert(result.end(), f.begin(), f.end());
    return result;
  }

 private:
  static Tensor weight(const Tensor& w) {
    TORCH_CHECK_VALUE(w.is_cpu() && w.scalar_type() == kDType && w.dim() == 4 && w.size(2) == w.size(3) && w.size(2) % 2 == 1,
                      "conv1, conv2: expected ", kDType, " CPU weights [K, C, n, n], n odd");
    return w;
  }
  Optional mask(const Optional& m, int64_t channels) const {
    if (!m) return m;
    TORCH_CHECK_VALUE(m->is_cpu() && m->scalar_type() == at::kBool && m->dim() == 4 && m->size(1) == channels && m->numel() == rows_ * channels,
                      "keeps: expected bool [N, ", channels, ", H, W]");
    return m->contiguous(at::MemoryFormat::ChannelsLast);
  }

  Slot<T> slot(int64_t channel) const { return {x_ + channel, channels_}; }
  template <typename G>
  Slot<const G> slot_of(const G* data, int64_t channel) const {
    return {data + channel, channels_};
  }
  template <typename Each>
  void slot_moments(const Unit& u, Each&& each) const {
    for (const Range& r : u.reads)
      if (r.size() > 0) each(moments_, r.begin, r.size());
  }

  // The channels `columns` of what the unit reads, normalised.
  void normalise(const Unit& u, const Read& read, Range columns, int64_t row, int64_t rows, Slot<T> out) const {
    int64_t first = 0;  // of the range among what is read
    for (const Range& r : u.reads) {
      const int64_t from = std::max(columns.begin, first), to = std::min(columns.end, first + r.size());
      if (from < to)
        normalise_rows<T, T>({slot_of<T>(x_, r.begin + from - first).row(row), rows, to - from, read.scale.data() + from,
                        read.shift.data() + from, out.column(from - columns.begin)});
      first += r.size();
    }
  }
  // `columns` of conv1(normalised) of n rows, n <= kTile, in float.
  void multiply(const Unit& u, const Read& read, const T* weights, Range columns, int64_t row, int64_t n, float* out) const {
    const int64_t channels = u.read(), pitch = kFloat ? channels : even(channels);
    T* act = scratch<T>(4, kTile * pitch);
    if (pitch != channels)
      for (int64_t i = 0; i < n; ++i) act[i * pitch + channels] = T(0);
    normalise(u, read, {0, channels}, row, n, {act, pitch});
    const T* right = weights + columns.begin * (kFloat ? 1 : 2);  // in bfloat16 in pairs of channels
    at::native::cpublas::brgemm(n, columns.size(), pitch, pitch, u.width, columns.size(), false, act, right, out);
  }
  // b = conv1(normalised), and its moments where they are asked for.
  void bottleneck(const Unit& u, const Read& read, T* b, Moment* moments) {
    const int64_t width = u.width, pad = padded(width);
    const T* weights = turned(u.conv1);
    Aligned<double> mean(moments ? parts_.count * pad : 0), m2(mean.size());
    parts_.run([&](int64_t part, int64_t from, int64_t to) {
      parts_.tiles(from, to, [&](int64_t i, int64_t n) {
        T* out = b + i * width;
        if constexpr (kFloat) {
          multiply(u, read, weights, {0, width}, i, n, out);
          drop(u.keep1, width, {0, width}, i, n, {out, width});
        } else {
          float* c = scratch<float>(5, kTile * width);
          multiply(u, read, weights, {0, width}, i, n, c);
          const bool* kept = u.keep1 ? u.keep1->const_data_ptr<bool>() + i * width : nullptr;
          finish_rows<float, T>({{c, width}, {}, n, width, nullptr, nullptr, nullptr, {kept, width}, keep_scale_, {out, width}});
        }
      });
      if (moments && to > from)
        moments_of_rows<T>({{b + from * width, width}, to - from, width, mean.data() + part * pad, m2.data() + part * pad});
    });
    if (moments) merge(parts_, mean, m2, width, moments->mean.data_ptr<float>(), moments->var.data_ptr<float>());
  }

  void drop(const Optional& keep, int64_t channels, Range columns, int64_t row, int64_t rows, Slot<float> x) const {
    if (keep)
      finish_rows<float, float>({{x.data, x.pitch}, {}, rows, columns.size(), nullptr, nullptr, nullptr,
                   {keep->const_data_ptr<bool>() + row * channels + columns.begin, channels}, keep_scale_, x});
  }

  // Both convolutions, where nothing is kept and both norms are known: the bottleneck is normalised while it is in the cache.
  void grow_at_once(const Unit& u, const Read& read, const Read& read2) {
    const int64_t width = u.width, threads = at::get_num_threads();
    const T* weights = turned(u.conv1);
    auto tile = [&](Range columns, int64_t row, int64_t n) {
      float* b = scratch<float>(5, kTile * columns.size());
      multiply(u, read, weights, columns, row, n, b);
      drop(u.keep1, width, columns, row, n, {b, columns.size()});
      return b;
    };
    auto finish = [&](const float* b, Range columns, int64_t rows, Slot<T> out) {
      normalise_rows<float, T>({{b, columns.size()}, rows, columns.size(), read2.scale.data() + columns.begin,
                                read2.shift.data() + columns.begin, out});
    };
    if constexpr (kFloat) {
      // Neighbouring bands both make the rows between them, unless one thread does.
      constexpr int64_t kRows = 12;
      if (by_tiles(u.conv2) && n_ * h_ >= kRows * threads) {
        const Range all{0, width};
        auto load = [&](int64_t pixel, int64_t rows, float* out, int64_t pitch) {
          over_tiles(pixel, pixel + rows * w_, [&](int64_t first, int64_t n) {
            const float* b = tile(all, first, n);
            for (int64_t k = 0; k < n;) {
              const int64_t at = first - pixel + k, column = at % w_, some = std::min(n - k, w_ - column);
              finish(b + k * width, all, some, {out + at / w_ * pitch + column * width, width});
              k += some;
            }
          });
        };
        winograd(Bands::among(threads, n_, h_, w_, width + u.growth), width, u.growth, load, tile_weight(u.conv2, false), slot(u.write), kNothing);
        return finish_growth(u, {x_ + u.write, channels_}, u.keep2);
      }
    }
    T* act = materialised(normalised_, width);
    // Where there are few rows for each thread, threads share the columns: a weight is read from far away.
    constexpr int64_t kColumns = 32;
    const int64_t by_rows = std::clamp<int64_t>(rows_ / (kTile / 2), 1, threads);
    const int64_t by_columns = std::clamp<int64_t>(width / kColumns, 1, threads / by_rows);
    at::parallel_for(0, by_rows * by_columns, 1, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) {
        const int64_t r = i / by_columns, c = i % by_columns;
        const Range columns{c * width / by_columns / kRegister * kRegister,
                            c + 1 == by_columns ? width : (c + 1) * width / by_columns / kRegister * kRegister};
        over_tiles(r * rows_ / by_rows, (r + 1) * rows_ / by_rows, [&](int64_t first, int64_t n) {
          finish(tile(columns, first, n), columns, n, {act + first * width + columns.begin, width});
        });
      }
      at::native::cpublas::brgemm_release();
    });
    if (by_tiles(u.conv2)) {
      auto load = [&](int64_t row, int64_t n, Slot<T> out) { std::copy_n(act + row * width, n * width, out.data); };
      return grow(u, u.conv2, width, load, u.keep2);
    }
    if constexpr (kFloat) {
      if (by_neighbours(u.conv2)) {
        convolve_by_neighbours(u.conv2, act, slot(u.write));
        return finish_growth(u, {x_ + u.write, channels_}, u.keep2);
      }
    }
    const Tensor growth = convolve(u.conv2, width, act);
    finish_growth(u, {growth.template const_data_ptr<T>(), u.growth}, u.keep2);
  }
  // body(first, n) over tiles of one size, or of one row less.
  template <typename Body>
  static void over_tiles(int64_t begin, int64_t end, const Body& body) {
    const int64_t rows = end - begin, count = (rows + kTile - 1) / kTile;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t first = begin + i * rows / count;
      body(first, begin + (i + 1) * rows / count - first);
    }
  }

  // The convolution of what `load` brings into the unit's slot, with dropout, and the slot's moments.
  template <typename Load>
  void grow(const Unit& u, const Tensor& w, int64_t channels, const Load& load, const Optional& keep) {
    if constexpr (kFloat) {
      if (by_tiles(w)) {
        convolve_by_tiles(w, channels, load, slot(u.write));
        return finish_growth(u, {x_ + u.write, channels_}, keep);
      }
    }
    const Tensor growth = convolve(w, channels, materialise(channels, load));
    finish_growth(u, {growth.template const_data_ptr<T>(), u.growth}, keep);
  }

  // A growth into its slot, where it may be already, with dropout; and its moments.
  void finish_growth(const Unit& u, Slot<const T> growth, const Optional& keep) {
    const bool* kept = keep ? keep->const_data_ptr<bool>() : nullptr;
    if (kept || growth.data != x_ + u.write)
      parts_.run([&](int64_t, int64_t from, int64_t to) {
        finish_rows<T, T>({growth.row(from), {}, to - from, u.growth, nullptr, nullptr, nullptr,
                     {kept ? kept + from * u.growth : nullptr, u.growth}, keep_scale_, slot(u.write).row(from)});
      });
    take_moments(u.write, u.growth);
  }

  void take_moments(int64_t first, int64_t channels) {
    if (wanted_) take_moments_of(slot_of<T>(x_, first), channels, moments_.mean.data_ptr<float>() + first, moments_.var.data_ptr<float>() + first);
  }

  // The sum, and its mean and variance where asked for.
  std::vector<Tensor> sum(const std::vector<Tensor>& terms, bool moments) const {
    std::vector<Tensor> total{terms[0]};
    for (size_t k = 1; k < terms.size();) {
      std::vector<Tensor> some{total[0]};
      while (k < terms.size() && static_cast<int>(some.size()) < kMaxTerms - 1) some.push_back(terms[k++]);
      total = rk_sum(some, std::vector<double>(some.size(), 1.0), std::vector<Optional>(some.size()), {}, true, false,
                     moments && k == terms.size(), false, {});
    }
    return total;
  }

  std::vector<Range> outside_summed() const {
    std::vector<bool> inside(channels_, false);
    std::fill_n(inside.begin(), inputs_, true);
    for (int64_t s : summed_) std::fill_n(inside.begin() + s, inputs_, true);
    std::vector<Range> gaps;
    for (int64_t c = 0; c < channels_; ++c) {
      if (inside[c]) continue;
      if (gaps.empty() || gaps.back().end != c) gaps.push_back({c, c});
      gaps.back().end = c + 1;
    }
    return gaps;
  }

  // The gradient of some slots once all that read them are done: the mean terms of all BatchNorms at once.
  void finish_slot(Range r, const Optional& keep, T* out) const {
    const int64_t n = r.size();
    Floats slope(padded(n)), offset(padded(n)), center(padded(n));
    const double count = static_cast<double>(rows_);
    for (int64_t c = 0; c < n; ++c) {
      slope[c] = static_cast<float>(-s2_[r.begin + c] / count);
      offset[c] = static_cast<float>(-s1_[r.begin + c] / count);
      center[c] = moments_.mean.const_data_ptr<float>()[r.begin + c];
    }
    parts_.run([&](int64_t, int64_t from, int64_t to) {
      finish_rows<float, T>({slot_of<float>(total_.const_data_ptr<float>(), r.begin).row(from), slot_of<T>(x_, r.begin).row(from), to - from, n,
                   center.data(), slope.data(), offset.data(),
                   {keep ? keep->const_data_ptr<bool>() + from * n : nullptr, n}, keep_scale_, {out + from * n, n}});
    });
  }

  // What the BatchNorm of a reader leaves to be done when the slots are finished.
  void defer(const Unit& u, const Read& read, const Sums& s) {
    if (!read.batch) return;
    int64_t c = 0;
    for (const Range& r : u.reads)
      for (int64_t k = r.begin; k < r.end; ++k, ++c) {
        s1_[k] += read.scales[c] * s.grad[c];
        s2_[k] += read.scales[c] * read.rstd[c] * s.product[c];
      }
  }

  // Through ReLU and BatchNorm into the slots: rows of the columns of what the unit reads.
  template <typename G>
  void read_backward(const Unit& u, const Read& read, Range columns, int64_t row, int64_t rows, Slot<const T> act,
                     Slot<const G> grad, double* sums, int64_t pad) const {
    int64_t first = 0;
    for (const Range& r : u.reads) {
      const int64_t from = std::max(columns.begin, first), to = std::min(columns.end, first + r.size());
      if (from < to) {
        const int64_t channel = r.begin + from - first;
        float* total = total_.data_ptr<float>();
        read_backward_rows<G, T>({act.column(from - columns.begin), grad.column(from - columns.begin), slot_of<T>(x_, channel).row(row),
                            rows, to - from, read.scale.data() + from, nullptr, read.center.data() + from,
                            {sums + from, sums + pad + from}, Slot<float>{total + channel, channels_}.row(row), {}});
      }
      first += r.size();
    }
  }

  std::vector<Tensor> plain_backward(const Unit& u) {
    const int64_t channels = u.read(), pad = padded(channels);
    const Read read = fold(u.norm1, channels, u.eps1, [&](auto&& each) { slot_moments(u, each); });
    T* grad = materialised(grad_, u.growth);
    finish_slot({u.write, u.write + u.growth}, u.keep1, grad);
    auto load = [&](int64_t row, int64_t n, Slot<T> out) { normalise(u, read, {0, channels}, row, n, out); };
    auto [dact, dconv] = conv_backward(grad, u.growth, load, channels, u.conv1);
    const T* d = dact.template const_data_ptr<T>();
    Aligned<double> sums(parts_.count * 2 * pad);
    parts_.run([&](int64_t part, int64_t from, int64_t to) {
      T* act = scratch<T>(0, parts_.tile * channels);
      parts_.tiles(from, to, [&](int64_t i, int64_t n) {
        load(i, n, {act, channels});
        read_backward<T>(u, read, {0, channels}, i, n, {act, channels}, {d + i * channels, channels}, sums.data() + 2 * part * pad, pad);
      });
    });
    const Sums s = total(sums, read, channels);
    defer(u, read, s);
    return {dconv, as_tensor(s.product, buffer_), as_tensor(s.grad, buffer_)};
  }

  std::vector<Tensor> bottleneck_backward(const Unit& u, const Tensor& mean2, const Tensor& var2, Tensor mid) {
    const int64_t channels = u.read(), width = u.width, pad = padded(channels), pad2 = padded(width);
    const Read read = fold(u.norm1, channels, u.eps1, [&](auto&& each) { slot_moments(u, each); });
    if (!mid.defined()) {
      materialised(mid_, width);
      mid = mid_;
      bottleneck(u, read, mid.template data_ptr<T>(), nullptr);
    }
    T* b = mid.template data_ptr<T>();
    Moment moments;
    moments.mean = mean2.contiguous();
    moments.var = var2.contiguous();
    const Read read2 = fold(u.norm2, width, u.eps2, [&](auto&& each) { each(moments, 0, width); });

    T* grad = materialised(grad_, u.growth);
    finish_slot({u.write, u.write + u.growth}, u.keep2, grad);
    auto load = [&](int64_t row, int64_t n, Slot<T> out) {
      normalise_rows<T, T>({{b + row * width, width}, n, width, read2.scale.data(), read2.shift.data(), out});
    };
    auto [dact, dconv2] = conv_backward(grad, u.growth, load, width, u.conv2);
    T* d = dact.template data_ptr<T>();

    // Through the second ReLU and BatchNorm; d becomes the gradient of the bottleneck.
    Aligned<double> sums2(parts_.count * 2 * pad2);
    parts_.run([&](int64_t part, int64_t from, int64_t to) {
      double* s = sums2.data() + 2 * part * pad2;
      read_backward_rows<T, T>({{}, {d + from * width, width}, {b + from * width, width}, to - from, width, read2.scale.data(),
                          read2.shift.data(), read2.center.data(), {s, s + pad2}, {}, {d + from * width, width}});
    });
    const Sums s2 = total(sums2, read2, width);
    Floats slope(pad2), offset(pad2);
    const double count = static_cast<double>(rows_);
    // scale * g + slope * (b - center) + offset; the scale goes into the columns of the weight and of its gradient.
    for (int64_t c = 0; c < width && read2.batch; ++c) {
      slope[c] = static_cast<float>(-read2.rstd[c] * s2.product[c] / count);
      offset[c] = static_cast<float>(-s2.grad[c] / count);
    }
    const Tensor scale2 = as_tensor(read2.scales, buffer_);
    const Tensor w = u.conv1.reshape({width, channels}).mul(scale2.unsqueeze(1)).to(kDType).contiguous();

    const int64_t blocks = (channels + kColumns - 1) / kColumns, each = std::min(channels, (channels / std::max<int64_t>(blocks, 1) + 31) / 32 * 32);
    // In bfloat16 what a product sums over is even: zeros fill it up.
    const int64_t tile = kFloat ? parts_.tile : even(parts_.tile), inner = kFloat ? width : even(width);
    float* products = this->template room<float>(products_, parts_.count * width * channels);
    Aligned<double> sums(parts_.count * 2 * pad);
    Aligned<T> right(kFloat ? 0 : inner * channels);
    if constexpr (!kFloat)
      for (int64_t c = 0; c < channels; c += each)
        pair({w.template const_data_ptr<T>() + c, channels}, width, std::min(each, channels - c), right.data() + inner * c);
    parts_.run([&](int64_t part, int64_t from, int64_t to) {
      T *turned = scratch<T>(0, tile * width), *x = scratch<T>(1, tile * each), *pairs = scratch<T>(2, tile * std::max(each, inner));
      float* dx = scratch<float>(3, tile * each);
      finish_rows<T, T>({{d + from * width, width}, {b + from * width, width}, to - from, width, read2.center.data(), slope.data(), offset.data(),
                         {u.keep1 ? u.keep1->const_data_ptr<bool>() + from * width : nullptr, width}, keep_scale_, {d + from * width, width}});
      float* product_of = products + part * width * channels;
      if (from == to) std::fill_n(product_of, width * channels, 0.f);
      for (int64_t c = 0; c < channels; c += each) {
        const int64_t n = std::min(each, channels - c);
        parts_.tiles(from, to, [&](int64_t i, int64_t rows) {
          const T* db = d + i * width;
          normalise(u, read, {c, c + n}, i, rows, {x, n});
          if constexpr (kFloat) {
            transpose_rows({{db, width}, rows, width, {turned, tile}});
            at::native::cpublas::brgemm(width, n, rows, tile, n, channels, i != from, turned, x, product_of + c);
            at::native::cpublas::brgemm(rows, n, width, width, channels, n, false, db, w.template const_data_ptr<T>() + c, dx);
          } else {
            turn({db, width}, rows, width, {turned, tile}, pairs);
            pair({x, n}, rows, n, pairs);
            product(width, n, even(rows), turned, tile, pairs, product_of + c, channels, i != from);
            if (inner != width) {
              for (int64_t k = 0; k < rows; ++k) {
                std::copy_n(db + k * width, width, pairs + k * inner);
                pairs[k * inner + width] = T(0);
              }
              db = pairs;
            }
            product(rows, n, inner, db, inner, right.data() + inner * c, dx, n);
          }
          read_backward<float>(u, read, {c, c + n}, i, rows, {x, n}, {dx, n}, sums.data() + 2 * part * pad, pad);
        });
      }
    });
    const Sums s = total(sums, read, channels);
    defer(u, read, s);
    const Tensor partial = at::from_blob(products, {parts_.count, width, channels}, options_.dtype(at::kFloat));
    const Tensor dconv1 = partial.sum(0).mul_(scale2.unsqueeze(1)).reshape(u.conv1.sizes()).to(kDType);
    return {dconv1, as_tensor(s.product, buffer_), as_tensor(s.grad, buffer_), dconv2, as_tensor(s2.product, buffer_), as_tensor(s2.grad, buffer_)};
  }

  const int64_t inputs_, channels_;
  const float keep_scale_;
  const std::vector<int64_t> summed_;
  std::vector<Unit> units_;
  Tensor buffer_, total_, mid_, grad_, products_;
  T* x_ = nullptr;
  bool wanted_ = true;  // the moments of the slots
  Moment moments_;
  std::vector<double> s1_, s2_;
};

}  // namespace

std::vector<Tensor> dense_block(const Tensor& x, const std::vector<Tensor>& conv1, const std::vector<Tensor>& conv2,
                                const std::vector<Optional>& norms, const std::vector<Optional>& keeps, double keep_scale,
                                const std::vector<int64_t>& reads, const std::vector<int64_t>& writes,
                                const std::vector<double>& eps, int64_t channels, const std::vector<int64_t>& summed,
                                const Optional& mean, const Optional& var, bool keep,
                                bool total_moments) {
  WithinOp within;
  return with_type(x, "x", [&](auto zero) {
    return Block<decltype(zero)>(x, conv1, conv2, norms, keeps, keep_scale, reads, writes, eps, x.size(1), channels, summed)
        .forward(x, mean, var, keep, total_moments);
  });
}

std::vector<Tensor> dense_block_backward(const Tensor& grad, const Tensor& buffer, const Tensor& mean, const Tensor& var,
                                         const std::vector<Tensor>& mid_moments, const std::vector<Tensor>& mids,
                                         const std::vector<Tensor>& conv1, const std::vector<Tensor>& conv2,
                                         const std::vector<Optional>& norms, const std::vector<Optional>& keeps,
                                         double keep_scale, const std::vector<int64_t>& reads,
                                         const std::vector<int64_t>& writes, const std::vector<double>& eps,
                                         int64_t inputs, const std::vector<int64_t>& summed) {
  WithinOp within;
  return with_type(buffer, "buffer", [&](auto zero) {
    return Block<decltype(zero)>(buffer, conv1, conv2, norms, keeps, keep_scale, reads, writes, eps, inputs, buffer.size(1), summed)
        .backward(grad, buffer, mean, var, mid_moments, mids);
  });
}

}  // namespace rkfast
