// Eight elements at a time: 16-byte accesses where memory allows, and conversion to what is computed in.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "common/arithmetic.h"
#include "cuda/kernels.h"

namespace rkfast::cuda {

constexpr int kLanes = 8;  // elements per thread: a byte of a ReLU mask, and 16 bytes of a 16-bit type

template <typename T>
struct Wide {
  using type = float;
};
template <>
struct Wide<double> {
  using type = double;
};
template <typename T>
using wide_t = typename Wide<T>::type;

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ double widen(double v) { return v; }
__device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float widen(__half v) { return __half2float(v); }

template <typename T>
__device__ __forceinline__ T narrow(wide_t<T> v) {
  return v;
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}
template <>
__device__ __forceinline__ __half narrow<__half>(float v) {
  return __float2half_rn(v);
}

// Neighbouring elements of a row. kWhole: there are eight, aligned to 16 bytes; else `valid` of them, the rest zero.
template <typename T>
struct alignas(16) Group {
  static constexpr int kAccesses = sizeof(T) * kLanes / sizeof(uint4);
  T values[kLanes];

  template <bool kWhole>
  __device__ __forceinline__ void load(const void* data, int64_t offset, int valid) {
    const T* from = static_cast<const T*>(data) + offset;
    if constexpr (kWhole) {
#pragma unroll
      for (int i = 0; i < kAccesses; ++i)
        reinterpret_cast<uint4*>(values)[i] = reinterpret_cast<const uint4*>(from)[i];
    } else {
#pragma unroll
      for (int k = 0; k < kLanes; ++k)
        values[k] = k < valid ? from[k] : narrow<T>(0);
    }
  }

  template <bool kWhole>
  __device__ __forceinline__ void store(void* data, int64_t offset, int valid) const {
    T* to = static_cast<T*>(data) + offset;
    if constexpr (kWhole) {
#pragma unroll
      for (int i = 0; i < kAccesses; ++i)
        reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(values)[i];
    } else {
#pragma unroll
      for (int k = 0; k < kLanes; ++k)
        if (k < valid) to[k] = values[k];
    }
  }

  __device__ __forceinline__ wide_t<T> operator[](int k) const { return widen(values[k]); }
  __device__ __forceinline__ void set(int k, wide_t<T> v) { values[k] = narrow<T>(v); }
};

template <typename Kernel, typename... Args>
void launch(Kernel* kernel, dim3 grid, dim3 block, cudaStream_t stream, const Args&... args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = stream;
  cudaLaunchKernelEx(&config, kernel, args...);
}

template <typename T>
struct Tag {
  using type = T;
};

// f(Tag<T>()) for the type stored.
template <typename F>
void for_dtype(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::kFloat: return f(Tag<float>());
    case Dtype::kDouble: return f(Tag<double>());
    case Dtype::kBFloat16: return f(Tag<__nv_bfloat16>());
    case Dtype::kHalf: return f(Tag<__half>());
  }
}

}  // namespace rkfast::cuda
