#include "cpu/slots.h"

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/from_blob.h>

#include <cmath>
#include <memory>

#include "common/arithmetic.h"
#include "cpu/host.h"
#include "cpu/winograd.h"

namespace rkfast {

Dispatch<NormaliseRows> normalise_rows;
Dispatch<MomentsOfRows> moments_of_rows;
Dispatch<FinishRows> finish_rows;
Dispatch<ReadBackwardRows> read_backward_rows;
Dispatch<TransposeRows> transpose_rows;
Dispatch<TransformInput> transform_input;
Dispatch<TransformOutput> transform_output;
Dispatch<TransformGradient> transform_gradient;
Dispatch<TransformWeight> transform_weight;

namespace {

constexpr int64_t kTile = 64;      // rows that are normalised into the cache and multiplied from there
constexpr int64_t kColumns = 256;  // channels that a tile of the backward takes at once

int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

using Floats = std::vector<float>;

// The rows in a number of parts that depends on their number alone, so that no sum depends on the threads.
struct Parts {
  int64_t rows, count, each, tile;

  explicit Parts(int64_t rows) : rows(rows), count(1) {
    while (count < 32 && rows / count >= 256) count *= 2;
    if (count == 1 && rows >= 2 * kTile) count = 2;
    each = std::max<int64_t>(1, (rows + count - 1) / count);
    const int64_t tiles = (each + kTile - 1) / kTile;
    tile = (each + tiles - 1) / tiles;
  }
  int64_t begin(int64_t part) const { return std::min(rows, part * each); }
  int64_t size(int64_t part) const { return begin(part + 1) - begin(part); }

  // body(part, begin, end)
  template <typename Body>
  void run(Body&& body) const {
    at::parallel_for(0, count, 1, [&](int64_t from, int64_t to) {
      for (int64_t part = from; part < to; ++part) body(part, begin(part), begin(part + 1));
      at::native::cpublas::brgemm_release(false);
    });
  }
  // body(first, n) over the tiles of a part
  template <typename Body>
  void tiles(int64_t from, int64_t to, Body&& body) const {
    for (int64_t i = from; i < to; i += tile) body(i, std::min(tile, to - i));
  }
};

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// BN as relu reads it: scale * x + shift, with what its gradient needs.
struct Read {
  Floats scale, shift, center;
  std::vector<double> scales, rstd;  // of channels, not rounded
  bool batch = false;                // statistics of the batch

  Read(int64_t channels) : scale(padded(channels)), shift(scale.size()), center(scale.size()), scales(channels), rstd(channels) {}
};

class Moment {  // of some channels, in float as they are kept
 public:
  Moment() = default;
  explicit Moment(int64_t channels, const Tensor& like)
      : mean(at::empty({channels}, like.options().dtype(at::kFloat))), var(at::empty({channels}, mean.options())) {}
  Tensor mean, var;
};

// Sums of parts, merged in order.
void merge(const Parts& parts, const std::vector<double>& mean, const std::vector<double>& m2, int64_t channels,
           float* mean_out, float* var_out) {
  for (int64_t c = 0; c < channels; ++c) {
    Welford<double> all;
    for (int64_t p = 0; p < parts.count; ++p)
      all.merge(static_cast<double>(parts.size(p)), mean[p * padded(channels) + c], m2[p * padded(channels) + c]);
    mean_out[c] = static_cast<float>(all.mean);
    var_out[c] = static_cast<float>(all.variance());
  }
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

class Block {
 public:
  Block(const Tensor& x, const std::vector<Tensor>& conv1, const std::vector<Tensor>& conv2,
        const std::vector<Optional>& norms, const std::vector<Optional>& keeps, double keep_scale,
        const std::vector<int64_t>& reads, const std::vector<int64_t>& writes, const std::vector<double>& eps,
        int64_t inputs, int64_t channels, const std::vector<int64_t>& summed)
      : n_(x.size(0)), h_(x.size(2)), w_(x.size(3)), rows_(n_ * h_ * w_), inputs_(inputs), channels_(channels),
        keep_scale_(static_cast<float>(keep_scale)), summed_(summed), parts_(rows_), options_(x.options()) {
    const size_t units = conv1.size();
    const bool neck = !conv2.empty();
    const size_t norms_each = neck ? 8 : 4, convs = neck ? 2 : 1;
    TORCH_CHECK_VALUE(x.is_cpu() && x.scalar_type() == at::kFloat && x.dim() == 4, "x: expected a float32 CPU tensor [N, C, H, W]");
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
        u.norm1[k] = vector(norms[i * norms_each + k], u.read());
        if (neck) u.norm2[k] = vector(norms[i * norms_each + 4 + k], u.width);
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
    x_ = buffer_.data_ptr<float>();
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
        auto load = [&](int64_t row, int64_t n, Slot<float> out) { normalise(u, read, {0, channels}, row, n, out); };
        grow(u, u.conv1, channels, load, u.keep1);
        continue;
      }
      if (!keep && u.norm2[2] && by_tiles(u.conv2)) {
        grow_in_bands(u, read, fold(u.norm2, u.width, u.eps2, [](auto&&) {}));
        continue;
      }
      Moment moments(u.width, buffer_);
      const Tensor mid = keep ? empty_nhwc(u.width) : Tensor();
      float* b = keep ? mid.data_ptr<float>() : materialised(mid_, u.width);
      bottleneck(u, read, b, &moments);
      if (u.norm2[2].has_value()) {
        moments.mean.copy_(*u.norm2[2]);
        moments.var.copy_(*u.norm2[3]);
      }
      const Read read2 = fold(u.norm2, u.width, u.eps2, [&](auto&& each) { each(moments, 0, u.width); });
      mid_moments.insert(mid_moments.end(), {moments.mean, moments.var});
      if (keep) mids.push_back(mid);
      auto load = [&](int64_t row, int64_t n, Slot<float> out) {
        normalise_rows({{b + row * u.width, u.width}, n, u.width, read2.scale.data(), read2.shift.data(), out});
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
    x_ = buffer_.data_ptr<float>();
    moments_.mean = mean.contiguous();
    moments_.var = var.contiguous();
    total_ = empty_nhwc(channels_);
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
    finish_slot({0, inputs_}, std::nullopt, dx.data_ptr<float>());
    std::vector<Tensor> result{dx};
    for (auto& f : found) result.insert(result.end(), f.begin(), f.end());
    return result;
  }

 private:
  static Tensor weight(const Tensor& w) {
    TORCH_CHECK_VALUE(w.is_cpu() && w.scalar_type() == at::kFloat && w.dim() == 4 && w.size(2) == w.size(3) && w.size(2) % 2 == 1,
                      "conv1, conv2: expected float32 CPU weights [K, C, n, n], n odd");
    return w;
  }
  static Optional vector(const Optional& v, int64_t channels) {
    if (!v) return v;
    TORCH_CHECK_VALUE(v->is_cpu() && v->numel() == channels, "norms: expected ", channels, " values on the CPU, got ", v->sizes());
    return v->to(at::kFloat).contiguous();
  }
  Optional mask(const Optional& m, int64_t channels) const {
    if (!m) return m;
    TORCH_CHECK_VALUE(m->is_cpu() && m->scalar_type() == at::kBool && m->dim() == 4 && m->size(1) == channels && m->numel() == rows_ * channels,
                      "keeps: expected bool [N, ", channels, ", H, W]");
    return m->contiguous(at::MemoryFormat::ChannelsLast);
  }

  Tensor empty_nhwc(int64_t channels) const {
    return at::empty({n_, channels, h_, w_}, options_.memory_format(at::MemoryFormat::ChannelsLast));
  }
  Tensor nhwc(float* data, int64_t channels) const {
    return at::from_blob(data, {n_, h_, w_, channels}, options_).permute({0, 3, 1, 2});
  }
  // Memory that the growths of a call share.
  float* room(Tensor& kept, int64_t size) const {
    if (!kept.defined() || kept.numel() < size) kept = at::empty({size}, options_);
    return kept.data_ptr<float>();
  }
  float* materialised(Tensor& kept, int64_t channels) const { return room(kept, rows_ * channels); }
  Slot<float> slot(int64_t channel) const { return {x_ + channel, channels_}; }
  Slot<const float> slot_of(const float* data, int64_t channel) const { return {data + channel, channels_}; }
  static const float* data(const Optional& v) { return v ? v->const_data_ptr<float>() : nullptr; }

  template <typename Each>
  void slot_moments(const Unit& u, Each&& each) const {
    for (const Range& r : u.reads)
      if (r.size() > 0) each(moments_, r.begin, r.size());
  }

  // `batch` calls back with (moments, first, n) for each range of channels, where the norm has no statistics of its own.
  template <typename Batch>
  Read fold(const Optional* norm, int64_t channels, double eps, Batch&& batch) const {
    Read r(channels);
    r.batch = !norm[2];
    const float *weight = data(norm[0]), *bias = data(norm[1]);
    int64_t c = 0;
    auto add = [&](const Moment& m, int64_t first, int64_t n) {
      const float *mean = m.mean.const_data_ptr<float>() + first, *var = m.var.const_data_ptr<float>() + first;
      for (int64_t k = 0; k < n; ++k, ++c) {
        r.rstd[c] = inverse_std(static_cast<double>(var[k]), eps);
        r.scales[c] = (weight ? weight[c] : 1.0) * r.rstd[c];
        r.scale[c] = static_cast<float>(r.scales[c]);
        r.shift[c] = static_cast<float>((bias ? bias[c] : 0.0) - mean[k] * r.scales[c]);
        r.center[c] = mean[k];
      }
    };
    if (r.batch) {
      batch(add);
    } else {
      Moment own;
      own.mean = *norm[2];
      own.var = *norm[3];
      add(own, 0, channels);
    }
    return r;
  }

  // The channels `columns` of what the unit reads, normalised.
  void normalise(const Unit& u, const Read& read, Range columns, int64_t row, int64_t rows, Slot<float> out) const {
    int64_t first = 0;  // of the range among what is read
    for (const Range& r : u.reads) {
      const int64_t from = std::max(columns.begin, first), to = std::min(columns.end, first + r.size());
      if (from < to)
        normalise_rows({slot_of(x_, r.begin + from - first).row(row), rows, to - from, read.scale.data() + from,
                        read.shift.data() + from, out.column(from - columns.begin)});
      first += r.size();
    }
  }
  // b = conv1(normalised), and its moments where they are asked for.
  void bottleneck(const Unit& u, const Read& read, float* b, Moment* moments) {
    const int64_t width = u.width, channels = u.read(), pad = padded(width);
    const Tensor w = u.conv1.reshape({width, channels}).contiguous();
    const float* weights = transposed(w.const_data_ptr<float>(), width, channels);
    std::vector<double> mean(moments ? parts_.count * pad : 0), m2(mean.size());
    parts_.run([&](int64_t part, int64_t from, int64_t to) {
      float* act = scratch(0, parts_.tile * channels);
      parts_.tiles(from, to, [&](int64_t i, int64_t n) {
        normalise(u, read, {0, channels}, i, n, {act, channels});
        float* out = b + i * width;
        at::native::cpublas::brgemm(n, width, channels, channels, width, width, false, act, weights, out);
        drop(u.keep1, width, i, n, {out, width});
      });
      if (moments && to > from)
        moments_of_rows({{b + from * width, width}, to - from, width, mean.data() + part * pad, m2.data() + part * pad});
    });
    if (moments) merge(parts_, mean, m2, width, moments->mean.data_ptr<float>(), moments->var.data_ptr<float>());
  }

  void drop(const Optional& keep, int64_t channels, int64_t row, int64_t rows, Slot<float> x) const {
    if (keep)
      finish_rows({{x.data, x.pitch}, {}, rows, channels, nullptr, nullptr, nullptr,
                   {keep->const_data_ptr<bool>() + row * channels, channels}, keep_scale_, x});
  }

  // Whether a convolution is done by winograd.h: enough tiles and channels to pay for the transforms.
  bool by_tiles(const Tensor& w) const {
    return w.size(2) == 3 && w.size(0) >= 16 && w.size(1) >= 16 && h_ >= 4 && w_ >= 4;
  }
  // [columns][rows] of a matrix [rows][columns].
  const float* transposed(const float* matrix, int64_t rows, int64_t columns) {
    float* out = room(transposed_, rows * columns);
    constexpr int64_t kEach = 64;
    at::parallel_for(0, (columns + kEach - 1) / kEach, 4, [&](int64_t from, int64_t to) {
      const int64_t first = from * kEach, n = std::min(columns, to * kEach) - first;
      transpose_rows({{matrix + first, columns}, rows, n, {out + first * rows, rows}});
    });
    return out;
  }
  // [9][channels][outputs] of w [outputs, channels, 3, 3] in tiles' form, or [9][outputs][channels] of the convolution that
  // its gradient is.
  const float* tile_weight(const Tensor& w, bool gradient) {
    const int64_t outputs = w.size(0), channels = w.size(1), size = outputs * channels;
    const bool taps_first = w.is_contiguous(at::MemoryFormat::ChannelsLast);  // [outputs][9][channels]
    float* tiles = room(tiles_, 16 * size);
    if (gradient && taps_first) {
      const float* last = w.const_data_ptr<float>() + 8 * channels;
      at::parallel_for(0, outputs, 8, [&](int64_t from, int64_t to) {
        for (int64_t k = from; k < to; ++k)
          transform_weight({last + 9 * k * channels, -channels, channels, tiles + k * channels, size, false});
      });
    } else if (gradient) {
      const Tensor taps = w.flip({2, 3}).permute({2, 3, 0, 1}).contiguous();
      transform_weight({taps.const_data_ptr<float>(), size, size, tiles, size, false});
    } else {
      const Tensor dense = taps_first ? w : w.contiguous();
      const float* taps = transposed(dense.const_data_ptr<float>(), outputs, 9 * channels);
      at::parallel_for(0, channels, 16, [&](int64_t from, int64_t to) {
        if (taps_first) {
          transform_weight({taps + from * outputs, size, (to - from) * outputs, tiles + from * outputs, size, false});
        } else {
          for (int64_t c = from; c < to; ++c)
            transform_weight({taps + 9 * c * outputs, outputs, outputs, tiles + c * outputs, size, false});
        }
      });
    }
    return tiles;
  }
  // load(row, n, out), which brings pixels, as load_band calls it.
  template <typename Load>
  auto by_rows(const Load& load, int64_t channels) const {
    return [&load, channels, this](int64_t pixel, int64_t rows, float* out, int64_t pitch) {
      for (int64_t i = 0; i < rows; ++i) load(pixel + i * w_, w_, Slot<float>{out + i * pitch, channels});
    };
  }
  // Both convolutions at once: of the bottleneck there is never more than a band.
  void grow_in_bands(const Unit& u, const Read& read, const Read& read2) {
    const int64_t width = u.width, channels = u.read();
    const Tensor w = u.conv1.reshape({width, channels}).contiguous();
    const float *tiles = tile_weight(u.conv2, false), *weights = transposed(w.const_data_ptr<float>(), width, channels);
    auto load = [&](int64_t pixel, int64_t rows, float* out, int64_t pitch) {
      const int64_t pixels = rows * w_, count = (pixels + kTile - 1) / kTile, tile = (pixels + count - 1) / count;
      float *act = scratch(4, kTile * channels), *b = scratch(5, kTile * width);
      for (int64_t i = 0; i < pixels; i += tile) {
        const int64_t n = std::min(tile, pixels - i);
        normalise(u, read, {0, channels}, pixel + i, n, {act, channels});
        at::native::cpublas::brgemm(n, width, channels, channels, width, width, false, act, weights, b);
        drop(u.keep1, width, pixel + i, n, {b, width});
        for (int64_t k = 0; k < n;) {
          const int64_t row = (i + k) / w_, column = (i + k) % w_, some = std::min(n - k, w_ - column);
          normalise_rows({{b + k * width, width}, some, width, read2.scale.data(), read2.shift.data(),
                          {out + row * pitch + column * width, width}});
          k += some;
        }
      }
    };
    winograd(Bands(n_, h_, w_, width + u.growth, at::get_num_threads()), width, u.growth, load, tiles, slot(u.write));
    finish_growth(u, {x_ + u.write, channels_}, u.keep2);
  }
  template <typename Load>
  float* materialise(int64_t channels, const Load& load) {
    float* out = materialised(normalised_, channels);
    parts_.run([&](int64_t, int64_t from, int64_t to) { load(from, to - from, Slot<float>{out + from * channels, channels}); });
    return out;
  }

  // The convolution of what `load` brings into the unit's slot, with dropout, and the slot's moments.
  template <typename Load>
  void grow(const Unit& u, const Tensor& w, int64_t channels, const Load& load, const Optional& keep) {
    if (by_tiles(w)) {
      const Bands bands(n_, h_, w_, channels + u.growth, at::get_num_threads());
      winograd(bands, channels, u.growth, by_rows(load, channels), tile_weight(w, false), slot(u.write));
      return finish_growth(u, {x_ + u.write, channels_}, keep);
    }
    const Tensor growth = at::conv2d(nhwc(materialise(channels, load), channels), w, {}, 1, w.size(2) / 2).contiguous(at::MemoryFormat::ChannelsLast);
    finish_growth(u, {growth.const_data_ptr<float>(), u.growth}, keep);
  }

  // A growth into its slot, where it may be already, with dropout; and its moments.
  void finish_growth(const Unit& u, Slot<const float> growth, const Optional& keep) {
    const bool* kept = keep ? keep->const_data_ptr<bool>() : nullptr;
    if (kept || growth.data != x_ + u.write)
      parts_.run([&](int64_t, int64_t from, int64_t to) {
        finish_rows({growth.row(from), {}, to - from, u.growth, nullptr, nullptr, nullptr,
                     {kept ? kept + from * u.growth : nullptr, u.growth}, keep_scale_, slot(u.write).row(from)});
      });
    take_moments(u.write, u.growth);
  }

  void take_moments(int64_t first, int64_t channels) {
    if (!wanted_) return;
    const int64_t pad = padded(channels);
    std::vector<double> mean(parts_.count * pad), m2(mean.size());
    parts_.run([&](int64_t part, int64_t from, int64_t to) {
      if (to > from)
        moments_of_rows({slot_of(x_, first).row(from), to - from, channels, mean.data() + part * pad, m2.data() + part * pad});
    });
    merge(parts_, mean, m2, channels, moments_.mean.data_ptr<float>() + first, moments_.var.data_ptr<float>() + first);
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
  void finish_slot(Range r, const Optional& keep, float* out) const {
    const int64_t n = r.size();
    Floats slope(padded(n)), offset(padded(n)), center(padded(n));
    const double count = static_cast<double>(rows_);
    for (int64_t c = 0; c < n; ++c) {
      slope[c] = static_cast<float>(-s2_[r.begin + c] / count);
      offset[c] = static_cast<float>(-s1_[r.begin + c] / count);
      center[c] = moments_.mean.const_data_ptr<float>()[r.begin + c];
    }
    parts_.run([&](int64_t, int64_t from, int64_t to) {
      finish_rows({slot_of(total_.const_data_ptr<float>(), r.begin).row(from), slot_of(x_, r.begin).row(from), to - from, n,
                   center.data(), slope.data(), offset.data(),
                   {keep ? keep->const_data_ptr<bool>() + from * n : nullptr, n}, keep_scale_, {out + from * n, n}});
    });
  }

  // Sums of parts [count][2][padded] in order: sum g, and sum g * x_hat.
  struct Sums {
    std::vector<double> grad, product;
  };
  Sums total(const std::vector<double>& sums, const Read& read, int64_t channels) const {
    Sums s{std::vector<double>(channels), std::vector<double>(channels)};
    const int64_t pad = padded(channels);
    for (int64_t p = 0; p < parts_.count; ++p)
      for (int64_t c = 0; c < channels; ++c) {
        s.grad[c] += sums[2 * p * pad + c];
        s.product[c] += sums[(2 * p + 1) * pad + c];
      }
    for (int64_t c = 0; c < channels; ++c) s.product[c] *= read.rstd[c];
    return s;
  }
  // The gradient of a weight, laid out as the weight is.
  static Tensor like(const Tensor& gradient, const Tensor& w) { return at::empty_like(w).copy_(gradient); }
  static Tensor as_tensor(const std::vector<double>& v, const Tensor& like) {
    Tensor t = at::empty({static_cast<int64_t>(v.size())}, like.options().memory_format(std::nullopt));
    std::copy(v.begin(), v.end(), t.data_ptr<float>());
    return t;
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
  void read_backward(const Unit& u, const Read& read, Range columns, int64_t row, int64_t rows, Slot<const float> act,
                     Slot<const float> grad, double* sums, int64_t pad) const {
    int64_t first = 0;
    for (const Range& r : u.reads) {
      const int64_t from = std::max(columns.begin, first), to = std::min(columns.end, first + r.size());
      if (from < to) {
        const int64_t channel = r.begin + from - first;
        float* total = total_.data_ptr<float>();
        read_backward_rows({act.column(from - columns.begin), grad.column(from - columns.begin), slot_of(x_, channel).row(row),
                            rows, to - from, read.scale.data() + from, nullptr, read.center.data() + from,
                            {sums + from, sums + pad + from}, Slot<float>{total + channel, channels_}.row(row), {}});
      }
      first += r.size();
    }
  }

  std::vector<Tensor> plain_backward(const Unit& u) {
    const int64_t channels = u.read(), pad = padded(channels);
    const Read read = fold(u.norm1, channels, u.eps1, [&](auto&& each) { slot_moments(u, each); });
    float* grad = materialised(grad_, u.growth);
    finish_slot({u.write, u.write + u.growth}, u.keep1, grad);
    auto load = [&](int64_t row, int64_t n, Slot<float> out) { normalise(u, read, {0, channels}, row, n, out); };
    auto [dact, dconv] = conv_backward(grad, u.growth, load, channels, u.conv1);
    const float* d = dact.template const_data_ptr<float>();
    std::vector<double> sums(parts_.count * 2 * pad);
    parts_.run([&](int64_t part, int64_t from, int64_t to) {
      float* act = scratch(0, parts_.tile * channels);
      parts_.tiles(from, to, [&](int64_t i, int64_t n) {
        load(i, n, {act, channels});
        read_backward(u, read, {0, channels}, i, n, {act, channels}, {d + i * channels, channels}, sums.data() + 2 * part * pad, pad);
      });
    });
    const Sums s = total(sums, read, channels);
    defer(u, read, s);
    return {dconv, as_tensor(s.product, buffer_), as_tensor(s.grad, buffer_)};
  }

  // The gradients of what a convolution read, which `load` brings, and of its weight.
  template <typename Load>
  std::pair<Tensor, Tensor> conv_backward(const float* grad, int64_t growth, const Load& load, int64_t channels, const Tensor& w) {
    if (by_tiles(w)) {
      auto rows = [&](int64_t row, int64_t n, Slot<float> out) { std::copy_n(grad + row * growth, n * growth, out.data); };
      Tensor dact = reused(dact_, channels);
      const Bands bands(n_, h_, w_, channels + growth, at::get_num_threads());
      const Tensor taps = at::empty({3, 3, growth, channels}, w.options().memory_format(std::nullopt));
      winograd(bands, growth, channels, by_rows(rows, growth), tile_weight(w, true), {dact.data_ptr<float>(), channels});
      // Bands of its own: its sums do not depend on the threads.
      winograd_weight(Bands(n_, h_, w_, channels + growth), channels, growth, by_rows(load, channels), {grad, growth}, taps.data_ptr<float>());
      return {dact, like(taps.permute({2, 3, 0, 1}), w)};
    }
    const int64_t pad = w.size(2) / 2;
    auto [dact, dw, dbias] = at::convolution_backward(nhwc(const_cast<float*>(grad), growth), nhwc(materialise(channels, load), channels), w,
                                                      std::nullopt, {1, 1}, {pad, pad}, {1, 1}, false, {0, 0}, 1, {true, true, false});
    return {dact.contiguous(at::MemoryFormat::ChannelsLast), like(dw, w)};
  }
  Tensor reused(Tensor& kept, int64_t channels) const {
    materialised(kept, channels);
    return kept;
  }

  std::vector<Tensor> bottleneck_backward(const Unit& u, const Tensor& mean2, const Tensor& var2, Tensor mid) {
    const int64_t channels = u.read(), width = u.width, pad = padded(channels), pad2 = padded(width);
    const Read read = fold(u.norm1, channels, u.eps1, [&](auto&& each) { slot_moments(u, each); });
    if (!mid.defined()) {
      materialised(mid_, width);
      mid = mid_;
      bottleneck(u, read, mid.data_ptr<float>(), nullptr);
    }
    float* b = mid.data_ptr<float>();
    Moment moments;
    moments.mean = mean2.contiguous();
    moments.var = var2.contiguous();
    const Read read2 = fold(u.norm2, width, u.eps2, [&](auto&& each) { each(moments, 0, width); });

    float* grad = materialised(grad_, u.growth);
    finish_slot({u.write, u.write + u.growth}, u.keep2, grad);
    auto load = [&](int64_t row, int64_t n, Slot<float> out) {
      normalise_rows({{b + row * width, width}, n, width, read2.scale.data(), read2.shift.data(), out});
    };
    auto [dact, dconv2] = conv_backward(grad, u.growth, load, width, u.conv2);
    float* d = dact.template data_ptr<float>();

    // Through the second ReLU and BatchNorm; d becomes the gradient of the bottleneck.
    std::vector<double> sums2(parts_.count * 2 * pad2);
    parts_.run([&](int64_t part, int64_t from, int64_t to) {
      double* s = sums2.data() + 2 * part * pad2;
      read_backward_rows({{}, {d + from * width, width}, {b + from * width, width}, to - from, width, read2.scale.data(),
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
    const Tensor w = u.conv1.reshape({width, channels}).mul(scale2.unsqueeze(1)).contiguous();
    const float* weights = w.const_data_ptr<float>();

    const int64_t blocks = (channels + kColumns - 1) / kColumns, each = std::min(channels, (channels / std::max<int64_t>(blocks, 1) + 31) / 32 * 32);
    const int64_t tile = parts_.tile;
    float* products = room(products_, parts_.count * width * channels);
    std::vector<double> sums(parts_.count * 2 * pad);
    parts_.run([&](int64_t part, int64_t from, int64_t to) {
      float *turned = scratch(0, tile * width), *x = scratch(1, tile * each), *dx = scratch(2, tile * each);
      finish_rows({{d + from * width, width}, {b + from * width, width}, to - from, width, read2.center.data(), slope.data(), offset.data(),
                   {u.keep1 ? u.keep1->const_data_ptr<bool>() + from * width : nullptr, width}, keep_scale_, {d + from * width, width}});
      float* product = products + part * width * channels;
      if (from == to) std::fill_n(product, width * channels, 0.f);
      for (int64_t c = 0; c < channels; c += each) {
        const int64_t n = std::min(each, channels - c);
        parts_.tiles(from, to, [&](int64_t i, int64_t rows) {
          const float* db = d + i * width;
          transpose_rows({{db, width}, rows, width, {turned, tile}});
          normalise(u, read, {c, c + n}, i, rows, {x, n});
          at::native::cpublas::brgemm(width, n, rows, tile, n, channels, i != from, turned, x, product + c);
          at::native::cpublas::brgemm(rows, n, width, width, channels, n, false, db, weights + c, dx);
          read_backward(u, read, {c, c + n}, i, rows, {x, n}, {dx, n}, sums.data() + 2 * part * pad, pad);
        });
      }
    });
    const Sums s = total(sums, read, channels);
    defer(u, read, s);
    const Tensor partial = at::from_blob(products, {parts_.count, width, channels}, options_);
    const Tensor dconv1 = partial.sum(0).mul_(scale2.unsqueeze(1)).reshape(u.conv1.sizes());
    return {dconv1, as_tensor(s.product, buffer_), as_tensor(s.grad, buffer_), dconv2, as_tensor(s2.product, buffer_), as_tensor(s2.grad, buffer_)};
  }

  const int64_t n_, h_, w_, rows_, inputs_, channels_;
  const float keep_scale_;
  const std::vector<int64_t> summed_;
  const Parts parts_;
  const at::TensorOptions options_;
  std::vector<Unit> units_;
  Tensor buffer_, total_, normalised_, mid_, grad_, dact_, products_, transposed_, tiles_;
  float* x_ = nullptr;
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
  WithoutAutocast guard;
  at::NoGradGuard no_grad;
  return Block(x, conv1, conv2, norms, keeps, keep_scale, reads, writes, eps, x.size(1), channels, summed)
      .forward(x, mean, var, keep, total_moments);
}

std::vector<Tensor> dense_block_backward(const Tensor& grad, const Tensor& buffer, const Tensor& mean, const Tensor& var,
                                         const std::vector<Tensor>& mid_moments, const std::vector<Tensor>& mids,
                                         const std::vector<Tensor>& conv1, const std::vector<Tensor>& conv2,
                                         const std::vector<Optional>& norms, const std::vector<Optional>& keeps,
                                         double keep_scale, const std::vector<int64_t>& reads,
                                         const std::vector<int64_t>& writes, const std::vector<double>& eps,
                                         int64_t inputs, const std::vector<int64_t>& summed) {
  WithoutAutocast guard;
  at::NoGradGuard no_grad;
  return Block(buffer, conv1, conv2, norms, keeps, keep_scale, reads, writes, eps, inputs, buffer.size(1), summed)
      .backward(grad, buffer, mean, var, mid_moments, mids);
}

}  // namespace rkfast
