// The arithmetic that CPU and CUDA kernels share: everything per channel, and the rules for a single element.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define RKFAST_HD __host__ __device__ __forceinline__
#else
#define RKFAST_HD inline
#endif

namespace rkfast {

// max(0, v) that passes NaN on, as torch.relu does.
template <typename T>
RKFAST_HD T relu(T v) {
  return v <= T(0) ? T(0) : v;
}

// Chan's merging of mean and sum of squared deviations, exact for any split of the values and free of cancellation: `count`
// values so far, and others that make up `share` of the whole.
template <typename T>
RKFAST_HD void chan_merge(T& mean, T& m2, T other_mean, T other_m2, T count, T share) {
  const T delta = other_mean - mean;
  mean += delta * share;
  m2 += other_m2 + delta * delta * count * share;
}

// Count, mean and sum of squared deviations of some values of one channel.
template <typename T>
struct Welford {
  T count = 0;
  T mean = 0;
  T m2 = 0;

  RKFAST_HD void merge(T other_count, T other_mean, T other_m2) {
    if (other_count == T(0)) return;
    const T total = count + other_count;
    chan_merge(mean, m2, other_mean, other_m2, count, other_count / total);
    count = total;
  }

  RKFAST_HD void merge(const Welford& other) {
    merge(other.count, other.mean, other.m2);
  }

  // Sums of (v - center) and (v - center)^2 over `n` values as moments of those values.
  static RKFAST_HD Welford from_sums(T n, T center, T sum, T sum_of_squares) {
    Welford w;
    if (n == T(0)) return w;
    const T offset = sum / n;
    const T m2 = sum_of_squares - sum * offset;
    w.count = n;
    w.mean = center + offset;
    w.m2 = m2 < T(0) ? T(0) : m2;  // NaN stays NaN
    return w;
  }

  RKFAST_HD T variance() const { return count == T(0) ? T(0) : m2 / count; }
};

// step * BN(x) = scale * (x - mean) + shift. Subtracting the mean first keeps channels whose mean is far larger than
// their deviation as exact as eager's.
template <typename T>
struct Affine {
  T scale;
  T shift;
};

template <typename T>
RKFAST_HD T inverse_std(T var, T eps) {
  return T(1) / std::sqrt(var + eps);
}

template <typename T>
RKFAST_HD Affine<T> fold(T rstd, T weight, T bias, T step) {
  return {step * weight * rstd, step * bias};
}

// dx = step * weight * rstd * g' + slope * (x - mean) + offset, where s0 = sum(step * g') and s1 = sum(step * g' * x_hat)
// over the channel's `count` values; both correction terms vanish where the statistics do not depend on x.
template <typename T>
struct Correction {
  T slope;
  T offset;
};

template <typename T>
RKFAST_HD Correction<T> correct(T rstd, T weight, T s0, T s1, T count) {
  if (count == T(0)) return {T(0), T(0)};
  const T p = weight * rstd;
  return {-p * rstd * s1 / count, -p * s0 / count};
}

}  // namespace rkfast
