// What the kernels take and give, free of torch: nvcc compiles them in seconds, the bindings stay plain C++.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <functional>

namespace rkfast::cuda {

constexpr int kMaxTerms = 16;
constexpr int kRunningStats = 32;  // per launch

// Of what is stored. Everything per channel, and every sum, is float (double where the storage is).
enum class Dtype { kFloat, kDouble, kBFloat16, kHalf };

// samples x channels x positions elements, laid out as common/layout.h says.
struct Shape {
  int64_t samples, channels, positions;
  bool channels_last;
};

// A tensor: elements between neighbouring samples and between neighbouring rows.
struct Operand {
  void* data = nullptr;
  int64_t outer = 0, inner = 0;
};

// A factor or summand per channel, or per sample and channel; none where data is null.
struct Vector {
  const void* data = nullptr;
  bool per_sample = false;
};

// Where to put a channel's mean and biased variance; not wanted where null.
struct Moments {
  void* mean = nullptr;
  void* var = nullptr;
};

// step * BN(x); none where x has no data.
struct Norm {
  Operand x;
  Vector mean, var, weight, bias, step;
  double eps = 0;
};

// out = act(norm + sum_j coeffs[j] * steps[j] * terms[j] + shift)
struct WeightedSum {
  int terms = 0;
  Operand term[kMaxTerms];
  double coeff[kMaxTerms] = {};
  Vector step[kMaxTerms];
  Norm norm;
  Vector shift;
  Operand out;
  uint8_t* mask = nullptr;
  bool relu = false;
};

// coeff * sum(g' * term) per channel, or per sample and channel; sum(g') where the term has no data.
struct ChannelSum {
  Operand term;
  double coeff = 1;
  bool per_sample = false;
  void* out = nullptr;
};

// grads[i] = coeff[i] * step[i] * g', and the sums.
struct WeightedSumBackward {
  Operand grad;
  const uint8_t* mask = nullptr;
  int grads = 0;
  Operand out[kMaxTerms];
  double coeff[kMaxTerms] = {};
  Vector step[kMaxTerms];
  int sums = 0;
  ChannelSum sum[kMaxTerms + 1];
};

// Each output where it has data. Without a mask, relu is decided by the output recomputed from x.
struct NormBackward {
  Operand grad;
  const uint8_t* mask = nullptr;
  Norm norm;
  bool relu = false, batch_stats = false;
  Operand dx;
  int grads = 0;
  Operand out[kMaxTerms];
  double coeff[kMaxTerms] = {};
  void *dweight = nullptr, *dbias = nullptr, *dstep = nullptr;
};

// One BatchNorm's running statistics; `stride` elements apart.
struct RunningStats {
  void *mean = nullptr, *var = nullptr;
  int64_t* batches = nullptr;
  int64_t channels = 0, mean_stride = 1, var_stride = 1;
  Dtype dtype = Dtype::kFloat;
};

struct RunningStatsUpdate {
  const void *mean = nullptr, *var = nullptr;
  bool is_double = false;
  double unbias = 1;    // count / (count - 1)
  double momentum = 0;  // negative: one over the number of batches
  int size = 0;
  RunningStats stats[kRunningStats];
};

// Where to work: workspaces live until the launches have been queued, the allocator orders their reuse by stream.
struct Queue {
  cudaStream_t stream;
  std::function<void*(size_t)> allocate;
};

// All queue their launches and return; the caller asks cudaGetLastError. Shapes have elements.
void rk_sum(Dtype, const Shape&, const WeightedSum&, const Moments&, const Queue&);
void rk_sum_backward(Dtype, const Shape&, const WeightedSumBackward&, const Queue&);
void bn_rk_sum(Dtype, const Shape&, const WeightedSum&, const Moments&, const Queue&);
void bn_rk_sum_backward(Dtype, const Shape&, const NormBackward&, const Queue&);
void channel_moments(Dtype, const Shape&, const Operand& x, const Moments&, const Queue&);
void update_running_stats(const RunningStatsUpdate&, const Queue&);

}  // namespace rkfast::cuda
