#include <ATen/core/grad_mode.h>

#include "cpu/convolution.h"

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

constexpr int64_t kColumns = 256;  // channels that a tile of the backward takes at once

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

struct Unit {  // one growth
  Range reads[2];
  int64_t write, growth, width;  // width: of the bottleneck, or 0
  Tensor conv1, conv2;
  Optional norm1[4], norm2[4];  // weight, bias, mean, var; no mean and var: those of the batch
  Optional keep1, keep2;
  double eps1, eps2;

  int64_t read() const { return reads[0].size() + reads[1].size(); }
};

class Block : Convolutions {
 public:
  Block(const Tensor& x, const std::vector<Tensor>& conv1, const std::vector<Tensor>& conv2,
        const std::vector<Optional>& norms, const std::vector<Optional>& keeps, double keep_scale,
        const std::vector<int64_t>& reads, const std::vector<int64_t>& writes, const std::vector<double>& eps,
        int64_t inputs, int64_t channels, const std::vector<int64_t>& summed)
      : Convolutions(x), inputs_(inputs), channels_(channels), keep_scale_(static_cast<float>(keep_scale)), summed_(summed) {
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
  Optional mask(const Optional& m, int64_t channels) const {
    if (!m) return m;
    TORCH_CHECK_VALUE(m->is_cpu() && m->scalar_type() == at::kBool && m->dim() == 4 && m->size(1) == channels && m->numel() == rows_ * channels,
                      "keeps: expected bool [N, ", channels, ", H, W]");
    return m->contiguous(at::MemoryFormat::ChannelsLast);
  }

  Slot<float> slot(int64_t channel) const { return {x_ + channel, channels_}; }
  Slot<const float> slot_of(const float* data, int64_t channel) const { return {data + channel, channels_}; }
  template <typename Each>
  void slot_moments(const Unit& u, Each&& each) const {
    for (const Range& r : u.reads)
      if (r.size() > 0) each(moments_, r.begin, r.size());
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
    winograd(Bands(n_, h_, w_, width + u.growth, at::get_num_threads()), width, u.growth, load, tiles, slot(u.write), kNothing);
    finish_growth(u, {x_ + u.write, channels_}, u.keep2);
  }
  // The convolution of what `load` brings into the unit's slot, with dropout, and the slot's moments.
  template <typename Load>
  void grow(const Unit& u, const Tensor& w, int64_t channels, const Load& load, const Optional& keep) {
    if (by_tiles(w)) {
      convolve_by_tiles(w, channels, load, slot(u.write));
      return finish_growth(u, {x_ + u.write, channels_}, keep);
    }
    const Tensor growth = convolve(w, channels, load);
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
    if (wanted_) take_moments_of(slot_of(x_, first), channels, moments_.mean.data_ptr<float>() + first, moments_.var.data_ptr<float>() + first);
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

  const int64_t inputs_, channels_;
  const float keep_scale_;
  const std::vector<int64_t> summed_;
  std::vector<Unit> units_;
  Tensor buffer_, total_, mid_, grad_, products_;
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
