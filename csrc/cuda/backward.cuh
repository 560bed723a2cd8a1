// What the backward passes of rk_sum and bn_rk_sum share.
#pragma once

#include "cuda/sweep.cuh"

namespace rkfast::cuda {

// Eight bits of a mask, all set where there is none.
__device__ __forceinline__ unsigned mask_bits(const uint8_t* mask, const At& at, int64_t mask_inner,
                                              int64_t mask_pitch) {
  return mask ? mask[(at.outer * mask_inner + at.inner) * mask_pitch + at.column / kLanes] : 0xffu;
}

// out[i] = coeff[i] * step[i] * g
template <typename T, bool kChannelsLast, bool kWhole>
__device__ __forceinline__ void write_gradients(int size, const Operand* out, const double* coeff, const Vector* step,
                                                const wide_t<T> (&g)[kLanes], const At& at, int64_t channels) {
  using A = wide_t<T>;
  using Vec = Channel<A, kChannelsLast>;
  for (int i = 0; i < size; ++i) {
    const Vec factor = Vec::template load<kWhole>(step ? step[i] : Vector(), at, channels, A(1));
    Group<T> scaled;
#pragma unroll
    for (int k = 0; k < kLanes; ++k)
      scaled.set(k, A(coeff[i]) * factor[k] * g[k]);
    scaled.template store<kWhole>(out[i].data, at.in(out[i]), at.valid);
  }
}

}  // namespace rkfast::cuda
