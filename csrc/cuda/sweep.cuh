// One pass over the memory, whatever is computed: how a tensor is cut into blocks, how each thread walks its share, and
// how the blocks' sums are merged. Two stages and no atomics, so that a result depends on the shape alone.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cuda/vector.cuh"

namespace rkfast::cuda {

constexpr int kThreads = 256;
constexpr int64_t kProcessors = 132;

// A batch is rows x columns with evenly spaced rows. channels_last: the columns are channels and a batch is everything,
// or a sample. contiguous: the columns are positions and a batch is a sample (its rows are channels) or, for sums per
// channel, a channel (its rows are samples).
struct Tiling {
  bool by_sample;
  bool aligned;  // every row of every operand starts at 16 bytes
  int64_t channels, columns, rows, batches;
  int64_t mask_inner, mask_pitch;  // mask row of (outer, inner) = outer * mask_inner + inner
  int64_t groups;                  // of eight columns, per row
  int64_t chunk, chunks;           // groups per block, blocks per row
  int64_t span, spans;             // rows per block, blocks per column
  dim3 block;

  int64_t blocks() const { return batches * chunks * spans; }
};

// Where a thread is: offset in a tensor = outer * its outer pitch + inner * its inner pitch + column.
struct At {
  int64_t outer, inner, column;
  int valid;  // elements from here to the end of the row, at most eight

  __device__ __forceinline__ int64_t in(const Operand& x) const { return outer * x.outer + inner * x.inner + column; }
};

// The lanes of a vector per channel: eight channels (channels_last) or one for all (contiguous).
template <typename A, bool kChannelsLast>
struct Channel {
  static constexpr int kSize = kChannelsLast ? kLanes : 1;
  A values[kSize];

  __device__ __forceinline__ A& operator[](int k) { return values[kChannelsLast ? k : 0]; }
  __device__ __forceinline__ A operator[](int k) const { return values[kChannelsLast ? k : 0]; }

  template <bool kWhole>
  static __device__ __forceinline__ Channel load(const Vector& v, const At& at, int64_t channels, A otherwise) {
    Channel result;
    const A* from = static_cast<const A*>(v.data);
    const int64_t sample = v.per_sample ? at.outer * channels : 0;
    if (from == nullptr) {
#pragma unroll
      for (int k = 0; k < kSize; ++k)
        result.values[k] = otherwise;
    } else if constexpr (kChannelsLast) {
      Group<A> group;
      group.template load<kWhole>(from, sample + at.column, at.valid);
#pragma unroll
      for (int k = 0; k < kSize; ++k)
        result.values[k] = group.values[k];
    } else {
      result.values[0] = from[sample + at.inner];
    }
    return result;
  }
};

// Nothing is summed.
struct Nothing {
  static constexpr bool kSums = false;
};

template <typename A>
struct Pair {
  A first = 0, second = 0;
  __device__ __forceinline__ void merge(const Pair& other) {
    first += other.first;
    second += other.second;
  }
};

// Two sums per channel.
template <typename A, bool kChannelsLast>
struct Sums {
  static constexpr bool kSums = true;
  using Lane = Pair<A>;
  Lane lanes[kChannelsLast ? kLanes : 1];

  __device__ __forceinline__ void add(int k, A first, A second) { lanes[kChannelsLast ? k : 0].merge({first, second}); }
  __device__ __forceinline__ Lane lane(int k) const { return lanes[k]; }
};

// Count, mean and squared deviations per channel. The lanes of a thread that exist have seen equally many values.
template <typename A, bool kChannelsLast>
struct Spread {
  static constexpr bool kSums = true;
  using Lane = Welford<A>;
  static constexpr int kSize = kChannelsLast ? kLanes : 1;
  A count = 0;
  A mean[kSize] = {}, m2[kSize] = {};

  __device__ __forceinline__ void add(const A (&v)[kLanes], int valid) {
    if constexpr (kChannelsLast) {
      count += 1;
      const A share = A(1) / count;
#pragma unroll
      for (int k = 0; k < kLanes; ++k) {
        const A delta = v[k] - mean[k];
        mean[k] += delta * share;
        m2[k] += delta * (v[k] - mean[k]);
      }
    } else {
      A sum = 0;
#pragma unroll
      for (int k = 0; k < kLanes; ++k)
        sum += k < valid ? v[k] : A(0);
      const A center = sum / A(valid);
      A deviation = 0;
#pragma unroll
      for (int k = 0; k < kLanes; ++k)
        deviation += k < valid ? (v[k] - center) * (v[k] - center) : A(0);
      Lane all = lane(0);
      all.merge(A(valid), center, deviation);
      count = all.count, mean[0] = all.mean, m2[0] = all.m2;
    }
  }
  __device__ __forceinline__ Lane lane(int k) const {
    Lane result;
    result.count = count, result.mean = mean[k], result.m2 = m2[k];
    return result;
  }
};

// Merges `size` neighbours, `stride` apart in shared memory, into the first; `index` is this thread's place among them.
// Every thread of the block calls it.
template <typename Lane>
__device__ __forceinline__ void merge_neighbours(Lane* mine, int index, int size, int stride, int lanes) {
  int half = 1;
  while (half < size)
    half *= 2;
  for (half /= 2; half > 0; half /= 2) {
    __syncthreads();
    if (index < half && index + half < size)
      for (int k = 0; k < lanes; ++k)
        mine[k].merge(mine[half * stride + k]);
  }
}

// Body: kChannelsLast, State (what is summed), cache<kWhole>(at), which gives what is held while a channel lasts, and
// visit<kWhole>(cached, at, state), which reads, computes and writes the elements at `at`; kAhead visits are unrolled,
// kBlocks fit a processor without spilling.
template <typename Body>
__global__ void __launch_bounds__(kThreads, Body::kBlocks)
    sweep(const __grid_constant__ Body body, const __grid_constant__ Tiling t, void* partials) {
  constexpr bool kChannelsLast = Body::kChannelsLast;
  [[maybe_unused]] constexpr int kAhead = Body::kAhead;
  const unsigned upper = blockIdx.x / unsigned(t.chunks);
  const int64_t chunk = blockIdx.x % unsigned(t.chunks);
  const int64_t span = upper % unsigned(t.spans), batch = upper / unsigned(t.spans);
  const int64_t first = span * t.span + threadIdx.y, last = min(t.rows, (span + 1) * t.span);
  typename Body::State state;

  At at;
  if constexpr (kChannelsLast) {
    at.outer = batch;
    at.column = (chunk * t.chunk + threadIdx.x) * kLanes;
    at.valid = int(max(int64_t(0), min(int64_t(kLanes), t.columns - at.column)));
    auto walk = [&](auto whole) {
      constexpr bool kWhole = decltype(whole)::value;
      const auto cached = body.template cache<kWhole>(at);
#pragma unroll kAhead
      for (at.inner = first; at.inner < last; at.inner += blockDim.y)
        body.template visit<kWhole>(cached, at, state);
    };
    if (t.aligned && at.valid == kLanes)
      walk(std::true_type());
    else if (at.valid > 0)
      walk(std::false_type());
  } else {
    const int64_t end = min(t.groups, (chunk + 1) * t.chunk);
    for (int64_t row = first; row < last; row += blockDim.y) {
      at.outer = t.by_sample ? batch : row;
      at.inner = t.by_sample ? row : batch;
      const auto cached = body.template cache<false>(at);
      for (int64_t group = chunk * t.chunk + threadIdx.x; group < end; group += blockDim.x) {
        at.column = group * kLanes;
        at.valid = int(min(int64_t(kLanes), t.columns - at.column));
        if (t.aligned && at.valid == kLanes)
          body.template visit<true>(cached, at, state);
        else
          body.template visit<false>(cached, at, state);
      }
    }
  }

  if constexpr (Body::State::kSums) {
    using Lane = typename Body::State::Lane;
    constexpr int kSize = kChannelsLast ? kLanes : 1;
    alignas(16) __shared__ unsigned char shared[kThreads * kSize * sizeof(Lane)];
    Lane* mine = reinterpret_cast<Lane*>(shared) + (threadIdx.y * blockDim.x + threadIdx.x) * kSize;
#pragma unroll
    for (int k = 0; k < kSize; ++k)
      mine[k] = state.lane(k);
    Lane* to = static_cast<Lane*>(partials);  // [slots, C]
    if constexpr (kChannelsLast) {
      merge_neighbours(mine, threadIdx.y, blockDim.y, blockDim.x * kSize, kSize);
      if (threadIdx.y == 0)
        for (int k = 0; k < at.valid; ++k)
          to[(batch * t.spans + span) * t.channels + at.column + k] = mine[k];
    } else {
      merge_neighbours(mine, threadIdx.x, blockDim.x, 1, 1);
      if (t.by_sample) {
        if (threadIdx.x == 0 && first < last) to[(batch * t.chunks + chunk) * t.channels + first] = *mine;
      } else {
        merge_neighbours(mine, threadIdx.x == 0 ? threadIdx.y : blockDim.y, blockDim.y, blockDim.x, 1);
        if (threadIdx.x == 0 && threadIdx.y == 0) to[(span * t.chunks + chunk) * t.channels + batch] = *mine;
      }
    }
  }
}

// Partials of a sweep: [slots, C]; by sample, the slots of a sample are neighbours.
struct Slots {
  int64_t samples, per_sample, channels;
};

inline Slots slots(const Tiling& t, bool channels_last) {
  if (t.by_sample) return {t.batches, channels_last ? t.spans : t.chunks, t.channels};
  return {channels_last ? t.spans : t.spans * t.chunks, 1, t.channels};
}

// Blocks of the second stage: eight channels wide, 32 threads to a channel.
constexpr int kMergeWidth = 8, kMergeHeight = 32;

inline dim3 merge_grid(int64_t channels) { return dim3(unsigned((channels + kMergeWidth - 1) / kMergeWidth)); }

// What the threads of a channel hold, merged, in the first of them.
template <typename Lane>
__device__ __forceinline__ Lane merge_block(const Lane& mine) {
  alignas(16) __shared__ unsigned char shared[kMergeWidth * kMergeHeight * sizeof(Lane)];
  Lane* at = reinterpret_cast<Lane*>(shared) + threadIdx.y * kMergeWidth + threadIdx.x;
  *at = mine;
  merge_neighbours(at, threadIdx.y, kMergeHeight, kMergeWidth, 1);
  return *at;
}

template <typename A>
__global__ void __launch_bounds__(kMergeWidth* kMergeHeight)
    finish_moments(const Welford<A>* partials, int64_t slots, int64_t channels, A* mean, A* var) {
  const int64_t c = int64_t(blockIdx.x) * kMergeWidth + threadIdx.x;
  Welford<A> all;
  if (c < channels)
    for (int64_t slot = threadIdx.y; slot < slots; slot += kMergeHeight)
      all.merge(partials[slot * channels + c]);
  all = merge_block(all);
  if (c < channels && threadIdx.y == 0) {
    mean[c] = all.mean;
    var[c] = all.variance();
  }
}

// Whether every access of eight may take 16 bytes at a time.
class Alignment {
 public:
  Alignment(size_t element, const Shape& s) : element_(element), shape_(s) {}
  void add(const Operand& x) {
    if (x.data)
      aligned_ &= (uintptr_t(x.data) | uintptr_t(x.outer * element_) | uintptr_t(x.inner * element_)) % 16 == 0;
  }
  void add(const Vector& v) {
    if (!v.data || !shape_.channels_last) return;
    const uintptr_t pitch = v.per_sample ? shape_.channels * std::max(element_, sizeof(float)) : 0;
    aligned_ &= (uintptr_t(v.data) | pitch) % 16 == 0;
  }
  operator bool() const { return aligned_; }

 private:
  size_t element_;
  const Shape& shape_;
  bool aligned_ = true;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// by_sample: something differs, or is summed, per sample. sums: a block costs a merge and a slot of partials.
inline Tiling tile(const Shape& s, bool aligned, bool by_sample, bool sums) {
  Tiling t = {};
  t.by_sample = by_sample || (!sums && !s.channels_last);
  t.aligned = aligned;
  t.channels = s.channels;
  t.mask_inner = s.channels_last ? s.positions : s.channels;
  t.columns = s.channels_last ? s.channels : s.positions;
  t.mask_pitch = ceil_div(t.columns, kLanes);
  if (s.channels_last) {
    t.batches = t.by_sample ? s.samples : 1;
    t.rows = t.by_sample ? s.positions : s.samples * s.positions;
  } else {
    t.batches = t.by_sample ? s.samples : s.channels;
    t.rows = t.by_sample ? s.channels : s.samples;
  }
  t.groups = ceil_div(t.columns, kLanes);
  const int64_t width = ceil_div(t.groups, ceil_div(t.groups, kThreads));
  const int64_t height = std::min(kThreads / width, t.rows);
  t.block = dim3(unsigned(width), unsigned(height));

  // Steps of each thread: enough blocks to fill the device before anyone takes a second step, then up to eight, which
  // keeps the last wave short; sums take as many as it needs to leave one set of partials per resident block.
  const int64_t steps = t.batches * ceil_div(t.rows, height) * ceil_div(t.groups, width);
  const int64_t fill = sums ? kProcessors : 16 * kProcessors;
  int64_t mine = std::clamp<int64_t>(steps / fill, 1, 8);
  if (sums) mine = std::max(mine, ceil_div(steps, 8 * kProcessors));
  const int64_t down = sums && t.by_sample && !s.channels_last ? 1 : std::min(mine, ceil_div(t.rows, height));
  t.span = down * height;
  t.spans = ceil_div(t.rows, t.span);
  t.chunk = s.channels_last ? width : width * std::max<int64_t>(mine / down, 1);
  t.chunks = ceil_div(t.groups, t.chunk);
  return t;
}

template <typename Body>
void run_sweep(const Body& body, const Tiling& t, void* partials, const Queue& queue) {
  launch(sweep<Body>, dim3(unsigned(t.blocks())), t.block, queue.stream, body, t, partials);
}

// Sweeps with a body that takes the moments of what it visits.
template <typename Body>
void run_moments(const Body& body, const Shape& s, bool aligned, bool by_sample, const Moments& moments,
                 const Queue& queue) {
  using Lane = typename Body::State::Lane;
  using A = decltype(Lane::mean);
  const Tiling t = tile(s, aligned, by_sample, true);
  const Slots found = slots(t, s.channels_last);
  const int64_t count = found.samples * found.per_sample;
  auto* partials = static_cast<Lane*>(queue.allocate(count * s.channels * sizeof(Lane)));
  run_sweep(body, t, partials, queue);
  launch(finish_moments<A>, merge_grid(s.channels), dim3(kMergeWidth, kMergeHeight), queue.stream,
         static_cast<const Lane*>(partials), count, s.channels, static_cast<A*>(moments.mean),
         static_cast<A*>(moments.var));
}

}  // namespace rkfast::cuda
