// 3x3 convolutions as products of transformed tiles, F(2x2, 3x3): 16 products where 36 would be (Lavin and Gray, "Fast
// Algorithms for Convolutional Neural Networks"). Tiles are 4x4 pixels that overlap by two, results 2x2; of few channels 1x4 and
// 1x2, F(2, 3). For host code: what is vectorised stands in winograd_kernel.cpp.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <vector>

#include "cpu/aligned.h"
#include "cpu/slots.h"

namespace rkfast {

// Bands of tile rows whose tiles, transformed, stay in the second-level cache. Those of an image have as many rows as each other, or
// one more.
struct Bands {
  int64_t height, width, columns, rows, per_image, count;

  static Bands among(int64_t threads, int64_t images, int64_t height, int64_t width, int64_t channels) {
    return Bands(images, height, width, channels, threads, threads);
  }
  // At least as many bands as `least`, where there are tile rows enough; a multiple of as many `threads`.
  Bands(int64_t images, int64_t height, int64_t width, int64_t channels, int64_t least = 1, int64_t threads = 1)
      : height(height), width(width), columns((width + 1) / 2), rows((height + 1) / 2) {
    constexpr int64_t kBytes = 600 << 10;
    const int64_t tiles = kBytes / (16 * 4 * channels), most = std::clamp<int64_t>(tiles / columns, 1, rows);
    per_image = std::max((rows + most - 1) / most, std::min(rows, (least + images - 1) / images));
    int64_t even = per_image;
    while (images * even % threads != 0 && even < rows) ++even;
    if (images * even % threads == 0) per_image = even;
    count = images * per_image;
  }
  // Of the tile rows of its image the first.
  int64_t first_row(int64_t band) const { return band % per_image * rows / per_image; }
  int64_t tile_rows(int64_t band) const { return (band % per_image + 1) * rows / per_image - first_row(band); }
  int64_t each() const { return (rows + per_image - 1) / per_image; }  // at most
  int64_t tiles() const { return each() * columns; }
  int64_t tiles(int64_t band) const { return tile_rows(band) * columns; }
  int64_t first_tile(int64_t band) const { return (band / per_image * rows + first_row(band)) * columns; }
  int64_t all_tiles() const { return count / per_image * rows * columns; }
  int64_t first_pixel(int64_t band) const { return (band / per_image * height + 2 * first_row(band)) * width; }
  // Bands whose tiles are multiplied together: until a weight that is larger than a cache is read for enough of them, but no
  // fewer than there are of `among`.
  int64_t together(int64_t among) const {
    constexpr int64_t kTiles = 64;
    return std::clamp<int64_t>(kTiles / tiles(), 1, std::max<int64_t>(count / among, 1));
  }
  // Pixels of a band.
  int64_t size(int64_t band) const { return std::min(2 * tile_rows(band), height - 2 * first_row(band)) * width; }
  // From one transformed value of a tile to the next: not a multiple of a page, or all 16 fall on the same cache lines.
  int64_t plane(int64_t channels, int64_t bands = 1) const { return bands * tiles() * channels + 16; }
};

// Memory of a thread that outlives the call: fresh pages cost more than the arithmetic on them.
template <typename T = float>
T* scratch(int which, int64_t size) {
  static thread_local Aligned<T> kept[8];
  if (static_cast<int64_t>(kept[which].size()) < size) kept[which].resize(size);
  return kept[which].data();
}

// The pixels under band `b`, with a border, transformed. load(pixel, rows, out, pitch) brings rows of the image from
// `pixel` on. Two of them are there already where this thread has just done the band before.
template <typename Load>
void load_band(const Bands& s, int64_t b, bool continues, int64_t channels, const Load& load, float* out, int64_t plane) {
  const int64_t image = b / s.per_image, first = s.first_row(b), rows = s.tile_rows(b);
  const int64_t wide = (2 * s.columns + 2) * channels, top = 2 * first - 1;
  float* strip = scratch(0, (2 * s.each() + 2) * wide);
  continues = continues && first > 0;
  if (continues) {
    const float* last = strip + 2 * s.tile_rows(b - 1) * wide;
    std::copy(last, last + 2 * wide, strip);
  }
  const int64_t begin = std::max<int64_t>(top + (continues ? 2 : 0), 0), end = std::min(top + 2 * rows + 2, s.height);
  for (int64_t i = continues ? 2 : 0; i < 2 * rows + 2; ++i) {
    float* row = strip + i * wide;
    const bool inside = top + i >= begin && top + i < end;
    std::fill_n(row, inside ? channels : wide, 0.f);
    if (inside) std::fill_n(row + (s.width + 1) * channels, wide - (s.width + 1) * channels, 0.f);
  }
  if (begin < end) load((image * s.height + begin) * s.width, end - begin, strip + (begin - top) * wide + channels, wide);
  transform_input({strip, wide, channels, rows, s.columns, channels, out, plane});
}

// A weight as `winograd` reads it: [16][channels][outputs], or that of ConvolveRow.
struct TileWeight {
  const float* data;
  bool rows;
};

// Whether tiles are 1x4 pixels in place of 4x4: of few channels, to transform takes as long as to multiply.
inline bool narrow(int64_t channels, int64_t outputs) {
  constexpr int64_t kNarrow = 16;
  return channels <= kNarrow && outputs <= kNarrow;
}

// Three rows of pixels at a time, transformed: a thread's own, in the first-level cache.
class RowWindow {
 public:
  RowWindow(const Bands& bands, int64_t channels)
      : s_(bands), channels_(channels), size_(TransformRow::size(bands.columns, channels)), pixels_(scratch(0, wide())), rows_(scratch(1, 3 * size_)) {
    std::fill_n(pixels_, wide(), 0.f);  // the border, and behind an odd last pixel
  }

  // each(i, rows): row i of the pixels of band b, and what its results read. `continues`: the band before has just been done.
  template <typename Load, typename Each>
  void over(int64_t b, bool continues, const Load& load, const Each& each) {
    const int64_t first = s_.first_pixel(b) / s_.width, last = first + s_.size(b) / s_.width;
    const int64_t top = first / s_.height * s_.height, bottom = top + s_.height;
    auto bring = [&](int64_t i) {
      if (i < top || i >= bottom) {
        std::fill_n(row(i), size_, 0.f);
      } else {
        load(i * s_.width, 1, pixels_ + channels_, wide());
        transform_row({pixels_, s_.columns, channels_, row(i)});
      }
    };
    for (int64_t i = continues && first > top ? first + 1 : first - 1; i <= first; ++i) bring(i);
    for (int64_t i = first; i < last; ++i) {
      bring(i + 1);
      const float* const rows[3] = {row(i - 1), row(i), row(i + 1)};
      each(i, rows);
    }
  }

 private:
  int64_t wide() const { return (2 * s_.columns + 2) * channels_; }
  float* row(int64_t i) const { return rows_ + (i + 3) % 3 * size_; }

  const Bands& s_;
  const int64_t channels_, size_;
  float *pixels_, *rows_;
};

template <typename Load, typename Then>
void winograd_rows(const Bands& s, int64_t channels, int64_t outputs, const Load& load, const float* weights, Slot<float> out,
                   const Then& then) {
  at::parallel_for(0, s.count, 1, [&](int64_t from, int64_t to) {
    RowWindow window(s, channels);
    for (int64_t b = from; b < to; ++b) {
      window.over(b, b > from, load, [&](int64_t i, const float* const* rows) {
        convolve_row({{rows[0], rows[1], rows[2]}, weights, s.columns, channels, outputs, out.row(i * s.width), s.width});
      });
      then(b, s.first_pixel(b), s.size(b));
    }
  });
}

// Of a weight that outgrows a core's cache: the threads share its products in place of the bands, so that each reads its own part of
// it, once for many tiles.
template <typename Load, typename Then>
void winograd_shared(const Bands& s, int64_t channels, int64_t outputs, const Load& load, const float* weights, Slot<float> out,
                     const Then& then) {
  constexpr int64_t kBytes = 8 << 20, kOutputs = 128;
  const int64_t most = std::clamp<int64_t>(kBytes / (16 * 4 * (channels + outputs) * s.tiles()), 1, s.count);
  const int64_t read = s.plane(channels, most), written = s.plane(outputs, most), blocks = (outputs + kOutputs - 1) / kOutputs;
  float *x = scratch(6, 16 * read), *m = scratch(7, 16 * written);
  for (int64_t begin = 0; begin < s.count; begin += most) {
    const int64_t end = std::min(s.count, begin + most), first = s.first_tile(begin);
    const int64_t tiles = s.first_tile(end - 1) + s.tiles(end - 1) - first;
    at::parallel_for(begin, end, 1, [&](int64_t from, int64_t to) {
      for (int64_t b = from; b < to; ++b) load_band(s, b, b > from, channels, load, x + (s.first_tile(b) - first) * channels, read);
    });
    at::parallel_for(0, 16 * blocks, 1, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) {
        const int64_t q = i / blocks, column = i % blocks * kOutputs;
        at::native::cpublas::brgemm(tiles, std::min(kOutputs, outputs - column), channels, channels, outputs, outputs, false, x + q * read,
                                    weights + q * channels * outputs + column, m + q * written + column);
      }
      at::native::cpublas::brgemm_release(false);
    });
    at::parallel_for(begin, end, 1, [&](int64_t from, int64_t to) {
      for (int64_t b = from; b < to; ++b) {
        const int64_t pixel = s.first_pixel(b);
        transform_output({m + (s.first_tile(b) - first) * outputs, written, s.tile_rows(b), s.columns, outputs, out.row(pixel).data,
                          s.width * out.pitch, out.pitch, s.size(b) / s.width, s.width});
        then(b, pixel, s.size(b));
      }
    });
  }
}

// out = the convolution of what `load` brings. then(b, pixel, n) follows on the n pixels that band b has written, while they are
// in cache.
template <typename Load, typename Then>
void winograd(const Bands& s, int64_t channels, int64_t outputs, const Load& load, TileWeight weights, Slot<float> out,
              const Then& then) {
  constexpr int64_t kWeight = 2 << 20;  // bytes, transformed
  if (weights.rows) return winograd_rows(s, channels, outputs, load, weights.data, out, then);
  if (16 * 4 * channels * outputs > kWeight) return winograd_shared(s, channels, outputs, load, weights.data, out, then);
  const int64_t each = s.together(at::get_num_threads()), groups = (s.count + each - 1) / each;
  const int64_t read = s.plane(channels, each), written = s.plane(outputs, each);
  at::parallel_for(0, groups, 1, [&](int64_t from, int64_t to) {
    float *x = scratch(1, 16 * read), *m = scratch(2, 16 * written);
    for (int64_t group = from; group < to; ++group) {
      const int64_t begin = group * each, end = std::min(s.count, begin + each);
      int64_t tiles = 0;
      for (int64_t b = begin; b < end; ++b) {
        load_band(s, b, b > from * each, channels, load, x + tiles * channels, read);
        tiles += s.tiles(b);
      }
      for (int q = 0; q < 16; ++q)
        at::native::cpublas::brgemm(tiles, outputs, channels, channels, outputs, outputs, false, x + q * read,
                                    weights.data + q * channels * outputs, m + q * written);
      tiles = 0;
      for (int64_t b = begin; b < end; ++b) {
        const int64_t pixel = s.first_pixel(b), rows = s.tiles(b) / s.columns;
        transform_output({m + tiles * outputs, written, rows, s.columns, outputs, out.row(pixel).data, s.width * out.pitch,
                          out.pitch, s.size(b) / s.width, s.width});
        tiles += s.tiles(b);
        then(b, pixel, s.size(b));
      }
    }
    at::native::cpublas::brgemm_release(false);
  });
}

// Where the gradient of a weight goes, rows of channels: from an output to the next, and from a tap of the nine to the next.
struct Taps {
  float* data;
  int64_t output, tap;
};

// The gradient of a weight. Its sums are taken in parts that depend on the shape alone, or, where all tiles together are
// less than these, over all of them at once.
class WeightGradient {
 public:
  WeightGradient(const Bands& bands, int64_t channels, int64_t outputs)
      : s_(bands), channels_(channels), outputs_(outputs), size_(outputs * channels), parts_(parts(bands, size_)) {}

  static bool fits(const Bands& bands, int64_t channels, int64_t outputs) {
    const int64_t size = outputs * channels;
    return bands.all_tiles() * (channels + outputs) <= parts(bands, size) * size;
  }

  // Where both are narrow.
  template <typename Load>
  void by_rows(const Load& load, Slot<const float> grad, Taps out) const {
    constexpr int64_t kRows = 8;
    const int64_t size = OuterRow::size(channels_, outputs_);
    Aligned<float> sums(parts_ * size);
    at::parallel_for(0, parts_, 1, [&](int64_t from, int64_t to) {
      RowWindow window(s_, channels_);
      float *turned = scratch(2, TransformRow::size(s_.columns, outputs_)), *sum = scratch(3, size);
      for (int64_t part = from; part < to; ++part) {
        const int64_t begin = part * s_.count / parts_, end = (part + 1) * s_.count / parts_;
        auto add = [&] {  // rows by themselves: over all of them sums would lose another digit
          for (int64_t i = 0; i < size; ++i) sums[part * size + i] += sum[i];
          std::fill_n(sum, size, 0.f);
        };
        std::fill_n(sum, size, 0.f);
        for (int64_t b = begin; b < end; ++b) {
          window.over(b, b > begin, load, [&](int64_t i, const float* const* rows) {
            transform_gradient_row({grad.row(i * s_.width), s_.width, s_.columns, outputs_, turned});
            outer_row({{rows[0], rows[1], rows[2]}, turned, s_.columns, channels_, outputs_, sum});
            if (i % kRows == kRows - 1) add();
          });
        }
        add();
      }
    });
    for (int64_t part = 1; part < parts_; ++part)
      for (int64_t i = 0; i < size; ++i) sums[i] += sums[part * size + i];
    finish_outer_row({sums.data(), channels_, outputs_, out.data, out.output, out.tap});
  }

  template <typename Load>
  void by_parts(const Load& load, Slot<const float> grad, Taps out) const {
    constexpr int64_t kNarrow = 64;  // channels of which to transpose would take as long as to multiply
    const bool narrow = std::max(channels_, outputs_) <= kNarrow;
    Aligned<float> sums(parts_ * 16 * size_);
    at::parallel_for(0, parts_, 1, [&](int64_t from, int64_t to) {
      const int64_t each = s_.together(2 * parts_), most = each * s_.tiles();
      const int64_t read = s_.plane(channels_, each), plane = s_.plane(outputs_, each);
      float *x = scratch(1, 16 * read), *g = scratch(2, 16 * plane), *turned = scratch(3, plane);
      for (int64_t part = from; part < to; ++part) {
        float* sum = sums.data() + part * 16 * size_;
        const int64_t begin = part * s_.count / parts_, end = (part + 1) * s_.count / parts_;
        for (int64_t first = begin; first < end; first += each) {
          int64_t tiles = 0;
          for (int64_t b = first; b < std::min(end, first + each); ++b) {
            transform(b, b > begin, load, grad, x + tiles * channels_, read, g + tiles * outputs_, plane);
            tiles += s_.tiles(b);
          }
          for (int q = 0; q < 16; ++q) {
            if (narrow) {
              outer_products({g + q * plane, x + q * read, tiles, outputs_, channels_, sum + q * size_});
            } else {
              transpose_rows({{g + q * plane, outputs_}, tiles, outputs_, {turned, most}});
              at::native::cpublas::brgemm(outputs_, channels_, tiles, most, channels_, channels_, true, turned,
                                          x + q * read, sum + q * size_);
            }
          }
        }
      }
      at::native::cpublas::brgemm_release(false);
    });
    if (parts_ > 1)
      at::parallel_for(0, 16 * size_, 1 << 15, [&](int64_t from, int64_t to) {
        for (int64_t part = 1; part < parts_; ++part)
          for (int64_t i = from; i < to; ++i) sums[i] += sums[part * 16 * size_ + i];
      });
    finish(sums.data(), out);
  }

  // A product for each transformed value and block of outputs, on whatever threads.
  template <typename Load>
  void at_once(const Load& load, Slot<const float> grad, Taps out) const {
    constexpr int64_t kOutputs = 64;
    const int64_t tiles = s_.all_tiles(), blocks = (outputs_ + kOutputs - 1) / kOutputs;
    const int64_t read = tiles * channels_ + 16, plane = tiles * outputs_ + 16;
    float *x = scratch(6, 16 * (read + plane)), *g = x + 16 * read, *sums = scratch(7, 16 * size_);
    at::parallel_for(0, s_.count, 1, [&](int64_t from, int64_t to) {
      for (int64_t b = from; b < to; ++b)
        transform(b, b > from, load, grad, x + s_.first_tile(b) * channels_, read, g + s_.first_tile(b) * outputs_, plane);
    });
    at::parallel_for(0, 16 * blocks, 1, [&](int64_t from, int64_t to) {
      float* turned = scratch(3, kOutputs * tiles);
      for (int64_t i = from; i < to; ++i) {
        const int64_t q = i / blocks, first = i % blocks * kOutputs, n = std::min(kOutputs, outputs_ - first);
        transpose_rows({{g + q * plane + first, outputs_}, tiles, n, {turned, tiles}});
        at::native::cpublas::brgemm(n, channels_, tiles, tiles, channels_, channels_, false, turned, x + q * read,
                                    sums + q * size_ + first * channels_);
      }
      at::native::cpublas::brgemm_release(false);
    });
    finish(sums, out);
  }

 private:
  static int64_t parts(const Bands& bands, int64_t size) {
    constexpr int64_t kSums = 4 << 20;  // at most, or to write and add them up costs more than the products
    return std::clamp<int64_t>(std::min(bands.count / 4, std::max<int64_t>(kSums / (16 * size), 2)), 1, 8);
  }

  template <typename Load>
  void transform(int64_t b, bool continues, const Load& load, Slot<const float> grad, float* x, int64_t read, float* g,
                 int64_t plane) const {
    load_band(s_, b, continues, channels_, load, x, read);
    transform_gradient({grad.row(s_.first_pixel(b)).data, s_.width * grad.pitch, grad.pitch, s_.size(b) / s_.width, s_.width,
                        s_.tiles(b) / s_.columns, s_.columns, outputs_, g, plane});
  }

  void finish(const float* sums, Taps out) const {
    at::parallel_for(0, outputs_, 16, [&](int64_t from, int64_t to) {
      for (int64_t k = from; k < to; ++k)
        transform_weight({sums + k * channels_, size_, channels_, out.data + k * out.output, out.tap, true});
    });
  }

  const Bands s_;
  const int64_t channels_, outputs_, size_, parts_;
};

}  // namespace rkfast
