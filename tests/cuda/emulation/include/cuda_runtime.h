// As much of CUDA as the kernels use, on the CPU: blocks one after another, the threads of a block as fibers that run
// from barrier to barrier, in an order that differs each time so that a missing barrier shows.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#include "cuda_runtime_api.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static

using std::max;
using std::min;

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

inline int64_t launches = 0;

class Fibers {
 public:
  // Runs `thread` for each index below `size`; throws where only a part of them meets a barrier.
  void run(unsigned size, const std::function<void(unsigned)>& thread, std::mt19937& random) {
    while (fibers_.size() < size)
      fibers_.push_back(std::make_unique<Fiber>());
    thread_ = &thread;
    std::vector<unsigned> order(size);
    std::iota(order.begin(), order.end(), 0u);
    for (unsigned i = 0; i < size; ++i)
      fibers_[i]->done = false;
    for (unsigned left = size; left > 0;) {
      std::shuffle(order.begin(), order.end(), random);
      unsigned ended = 0;
      for (unsigned i : order) {
        current_ = i;
        enter(*fibers_[i]);
        ended += fibers_[i]->done;
      }
      if (ended != 0 && ended != left) {
        fibers_.clear();
        throw std::runtime_error("emulation: some threads of a block ended while others wait at a barrier");
      }
      left -= ended;
    }
  }

  void barrier() { leave(*fibers_[current_]); }
  unsigned current() const { return current_; }

 private:
  struct Fiber {
    std::unique_ptr<char[]> stack{new char[kStack]};
    ucontext_t context;
    jmp_buf here;
    bool started = false, done = false;
  };
  static constexpr size_t kStack = 128 * 1024;

  void enter(Fiber& fiber) {
    if (_setjmp(scheduler_) != 0) return;
    if (fiber.started) _longjmp(fiber.here, 1);
    fiber.started = true;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    const auto self = reinterpret_cast<uintptr_t>(this);
    makecontext(&fiber.context, reinterpret_cast<void (*)()>(&Fibers::main), 2, unsigned(self >> 32), unsigned(self));
    setcontext(&fiber.context);
  }
  void leave(Fiber& fiber) {
    if (_setjmp(fiber.here) == 0) _longjmp(scheduler_, 1);
  }
  // A fiber outlives its thread and waits for the next block's.
  static void main(unsigned high, unsigned low) {
    auto* self = reinterpret_cast<Fibers*>(uintptr_t(high) << 32 | low);
    for (;;) {
      (*self->thread_)(self->current_);
      Fiber& fiber = *self->fibers_[self->current_];
      fiber.done = true;
      self->leave(fiber);
    }
  }

  std::vector<std::unique_ptr<Fiber>> fibers_;
  const std::function<void(unsigned)>* thread_ = nullptr;
  unsigned current_ = 0;
  jmp_buf scheduler_;
};

inline Fibers fibers;
inline std::mutex device;

inline void place() {
  const unsigned i = fibers.current();
  threadIdx = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y));
}

}  // namespace emulation

extern "C" [[gnu::used]] inline int64_t emulated_launches() { return emulation::launches; }

inline void __syncthreads() {
  emulation::fibers.barrier();
  emulation::place();
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const std::lock_guard<std::mutex> one_at_a_time(emulation::device);
  const auto threads = uint64_t(config->blockDim.x) * config->blockDim.y * config->blockDim.z;
  if (threads == 0 || threads > 1024 || config->gridDim.x == 0)
    throw std::runtime_error("emulation: invalid configuration");
  ++emulation::launches;
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  std::mt19937 random(1);
  const std::function<void(unsigned)> thread = [&](unsigned) {
    emulation::place();
    kernel(arguments...);
  };
  for (unsigned block = 0; block < gridDim.x; ++block) {
    blockIdx = dim3(block);
    emulation::fibers.run(unsigned(threads), thread, random);
  }
  return 0;
}
