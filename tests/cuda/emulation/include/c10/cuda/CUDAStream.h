#pragma once

#include <c10/core/Device.h>

#include "cuda_runtime_api.h"

namespace c10::cuda {
struct CUDAStream {
  cudaStream_t stream() const { return nullptr; }
};
inline CUDAStream getCurrentCUDAStream(DeviceIndex) { return {}; }
}  // namespace c10::cuda
