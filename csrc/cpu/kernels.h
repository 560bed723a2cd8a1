// What the host code asks of the vectorised kernels. A *_kernel.cpp file is compiled once per instruction set and enters
// itself into the table below; the host picks the best that the processor has. Free of torch headers.
#pragma once

#include <array>
#include <cstdint>

namespace rkfast {

constexpr int64_t kJoined = 512;  // elements from which on rows are not joined
constexpr int kMaxTerms = 17;  // 16 and, in bn_rk_sum, the normalised one
constexpr int64_t kPad = 32;   // vectors per channel are padded to whole registers of every type

enum class DType { kFloat, kDouble, kBFloat16, kHalf };

// The rows a kernel walks, split into units of work by the shape alone, so that no result depends on the thread count.
struct Shape {
  int64_t outer, inner, length;
  int64_t last;  // length of the last row; differs only where rows cut a flat tensor
  bool channels_last;
  int64_t replicas;  // rows of few channels that were joined to one: the channels repeat along it
  int64_t unit;      // rows per unit; a unit never spans two samples
  bool reverse;      // from the last unit to the first: a second pass finds the end of the first in cache

  int64_t splits() const { return unit == 0 ? 0 : (inner + unit - 1) / unit; }
  int64_t units() const { return outer * splits(); }
  // Columns of what a reduction leaves behind: one vector per unit (channels_last) or per sample (contiguous).
  int64_t columns() const { return channels_last ? length : inner; }
  int64_t channels() const { return columns() / replicas; }
  int64_t padded() const { return (columns() + kPad - 1) / kPad * kPad; }
  int64_t partials() const { return channels_last ? units() : outer; }
};

struct Operand {
  const void* data = nullptr;
  int64_t outer = 0, inner = 0;  // pitches in elements
};

// A factor per channel [padded] or per sample and channel [outer][padded], in float (double), or one for all.
struct Factor {
  const void* vector = nullptr;
  int64_t outer = 0;  // elements from sample to sample; 0 where it is the same for all
  double scalar = 1;
};

struct Moments {  // of each unit or sample, in double, [partials][padded]
  double* mean = nullptr;
  double* m2 = nullptr;
};

// out = act(sum_j factor_j * (term_j - center_j) + shift); a center belongs to the last term only, whose factor is then a
// vector.
struct Combine {
  Shape shape;
  DType dtype;
  int n = 0;
  std::array<Operand, kMaxTerms> terms;
  std::array<Factor, kMaxTerms> factors;
  const void* center = nullptr;  // [padded]
  Factor shift{nullptr, 0, 0};
  bool relu = false;
  Operand out;              // none: only the mask is written
  uint8_t* mask = nullptr;  // [rows * replicas][(length / replicas + 7) / 8]
  Moments moments;
  bool stream = false;  // out is written past the caches; not with moments, which read it back
};

// With g' = grad where the mask is set:
// sums[0] = sum g' (where sum_grad), sums[1 + j] = sum g' * (summed_j - center), outputs_k = factor_k * g'; to output 0
// slope * (x - center) + offset is added where there is an x.
struct Backward {
  Shape shape;
  DType dtype;
  Operand grad;
  uint8_t* mask = nullptr;
  const Combine* sign = nullptr;  // writes the mask first, where none was kept
  bool sum_grad = false;
  int n_summed = 0;
  std::array<Operand, kMaxTerms> summed;
  double* sums = nullptr;  // [1 + n_summed][partials][padded]
  int n_outputs = 0;
  std::array<Operand, kMaxTerms> outputs;
  bool stream = false;  // outputs are written past the caches
  std::array<Factor, kMaxTerms> factors;
  Operand x;
  const void* center = nullptr;
  const void* slope = nullptr;
  const void* offset = nullptr;
};

int cpu_capability();  // 0 DEFAULT, 1 AVX2, 2 AVX512: of the processor, or as ATen was told

template <typename Args>
struct Dispatch {
  using Kernel = void (*)(const Args&);
  Kernel by_capability[3] = {};

  void operator()(const Args& args) const {
    int use = cpu_capability();
    while (use > 0 && by_capability[use] == nullptr) --use;
    by_capability[use](args);
  }
};

struct MomentsOf {
  Shape shape;
  DType dtype;
  Operand x;
  Moments moments;
};

// Of bn_relu_pool, two rows of pixels at a time, channels_last; pitches in elements, vectors [padded] in float (double).
// out [columns][channels] = a quarter of the sum of relu(scale * (x - center) + shift) over windows of 2x2.
struct PoolRows {
  DType dtype;
  const void* x;
  int64_t row, pixel, columns, channels;
  const void *scale, *shift, *center;
  void* out;
};

// With g' a quarter of the window's grad where the ReLU is open: sums[0] += sum g' and sums[1] += sum g' * (x - center), where
// there are row_sums; else dx [rows][width][channels] = scale * g', and with a slope slope * (x - center) + offset besides.
// Without a grad the rows, and in any case columns from 2 * columns on, belong to no window: g' is 0 there.
struct PoolRowsBackward {
  DType dtype;
  const void* x;
  int64_t row, pixel;
  const void* grad;
  int64_t grad_pixel, columns, width, rows, channels;
  const void *scale, *shift, *center, *slope, *offset;
  double* sums[2];
  void* row_sums;  // memory for 2 * padded values
  void* dx;
  bool stream;  // dx is written past the caches
};

inline Dispatch<PoolRows> pool_rows;
inline Dispatch<PoolRowsBackward> pool_rows_backward;
inline Dispatch<Combine> combine;
inline Dispatch<Backward> backward;
inline Dispatch<MomentsOf> moments_of;

template <typename Args>
struct Enter {
  Enter(Dispatch<Args>& table, int capability, typename Dispatch<Args>::Kernel kernel) {
    table.by_capability[capability] = kernel;
  }
};

}  // namespace rkfast
