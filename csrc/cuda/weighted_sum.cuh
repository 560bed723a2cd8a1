// The forward pass of rk_sum and bn_rk_sum.
#pragma once

#include "cuda/sweep.cuh"

namespace rkfast::cuda {

// BN folded for the channels of a thread.
template <typename A, bool kChannelsLast>
struct Folded {
  Channel<A, kChannelsLast> mean, scale, shift;

  template <bool kWhole>
  static __device__ __forceinline__ Folded load(const Norm& norm, const At& at, int64_t channels) {
    using Vec = Channel<A, kChannelsLast>;
    Folded f;
    f.mean = Vec::template load<kWhole>(norm.mean, at, channels, A(0));
    const Vec var = Vec::template load<kWhole>(norm.var, at, channels, A(1));
    const Vec weight = Vec::template load<kWhole>(norm.weight, at, channels, A(1));
    const Vec bias = Vec::template load<kWhole>(norm.bias, at, channels, A(0));
    const Vec step = Vec::template load<kWhole>(norm.step, at, channels, A(1));
#pragma unroll
    for (int k = 0; k < Vec::kSize; ++k) {
      const Affine<A> affine = fold(inverse_std(var[k], A(norm.eps)), weight[k], bias[k], step[k]);
      f.scale[k] = affine.scale;
      f.shift[k] = affine.shift;
    }
    return f;
  }

  __device__ __forceinline__ A operator()(int k, A x) const { return scale[k] * (x - mean[k]) + shift[k]; }
};

template <typename T, bool kChannelsLast_, bool kNorm, bool kMoments>
struct WeightedSumBody {
  static constexpr bool kChannelsLast = kChannelsLast_;
  static constexpr int kAhead = 1, kBlocks = sizeof(T) == 2 && !kNorm && !kMoments ? 4 : 1;
  using A = wide_t<T>;
  using Vec = Channel<A, kChannelsLast>;
  using State = std::conditional_t<kMoments, Spread<A, kChannelsLast>, Nothing>;
  using Cached = std::conditional_t<kNorm, Folded<A, kChannelsLast>, Nothing>;

  WeightedSum sum;
  int64_t channels, mask_inner, mask_pitch;

  template <bool kWhole>
  __device__ __forceinline__ Cached cache(const At& at) const {
    if constexpr (kNorm) return Cached::template load<kWhole>(sum.norm, at, channels);
    return Cached();
  }

  template <bool kWhole>
  __device__ __forceinline__ void visit(const Cached& cached, const At& at, State& state) const {
    A total[kLanes];
    if constexpr (kNorm) {
      Group<T> x;
      x.template load<kWhole>(sum.norm.x.data, at.in(sum.norm.x), at.valid);
#pragma unroll
      for (int k = 0; k < kLanes; ++k)
        total[k] = cached(k, x[k]);
    } else {
      const Vec shift = Vec::template load<kWhole>(sum.shift, at, channels, A(0));
#pragma unroll
      for (int k = 0; k < kLanes; ++k)
        total[k] = shift[k];
    }

    constexpr int kTogether = 4;  // loads in flight
    for (int first = 0; first < sum.terms; first += kTogether) {
      Group<T> term[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const int j = first + i;
        if (j < sum.terms) term[i].template load<kWhole>(sum.term[j].data, at.in(sum.term[j]), at.valid);
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const int j = first + i;
        if (j >= sum.terms) break;
        const Vec step = Vec::template load<kWhole>(sum.step[j], at, channels, A(1));
        const A coeff = A(sum.coeff[j]);
#pragma unroll
        for (int k = 0; k < kLanes; ++k)
          total[k] += coeff * step[k] * term[i][k];
      }
    }

    Group<T> out;
    unsigned bits = 0;
    A stored[kLanes];
#pragma unroll
    for (int k = 0; k < kLanes; ++k) {
      out.set(k, sum.relu ? relu(total[k]) : total[k]);
      stored[k] = out[k];
      bits |= unsigned(k < at.valid && !(stored[k] <= A(0))) << k;
    }
    out.template store<kWhole>(sum.out.data, at.in(sum.out), at.valid);
    if (sum.mask) sum.mask[(at.outer * mask_inner + at.inner) * mask_pitch + at.column / kLanes] = uint8_t(bits);
    if constexpr (kMoments) state.add(stored, at.valid);
  }
};

template <typename T, bool kNorm, bool kChannelsLast>
void run_weighted_sum(const Shape& s, const WeightedSum& sum, const Moments& moments, const Queue& queue) {
  Alignment aligned(sizeof(T), s);
  bool by_sample = sum.norm.step.per_sample;
  for (int j = 0; j < sum.terms; ++j) {
    aligned.add(sum.term[j]);
    aligned.add(sum.step[j]);
    by_sample |= sum.step[j].per_sample;
  }
  for (const Vector& v : {sum.shift, sum.norm.mean, sum.norm.var, sum.norm.weight, sum.norm.bias, sum.norm.step})
    aligned.add(v);
  aligned.add(sum.norm.x);
  aligned.add(sum.out);
  // Contiguous rows read their vectors anew, whichever way they are walked.
  const bool split = by_sample && kChannelsLast;
  const Tiling t = tile(s, aligned, split, false);
  if (moments.mean) {
    using Body = WeightedSumBody<T, kChannelsLast, kNorm, true>;
    run_moments(Body{sum, s.channels, t.mask_inner, t.mask_pitch}, s, aligned, split, moments, queue);
  } else {
    using Body = WeightedSumBody<T, kChannelsLast, kNorm, false>;
    run_sweep(Body{sum, s.channels, t.mask_inner, t.mask_pitch}, t, nullptr, queue);
  }
}

template <bool kNorm>
void weighted_sum(Dtype dtype, const Shape& s, const WeightedSum& sum, const Moments& moments, const Queue& queue) {
  for_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (s.channels_last)
      run_weighted_sum<T, kNorm, true>(s, sum, moments, queue);
    else
      run_weighted_sum<T, kNorm, false>(s, sum, moments, queue);
  });
}

}  // namespace rkfast::cuda
