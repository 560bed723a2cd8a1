#include "cuda/sweep.cuh"

namespace rkfast::cuda {
namespace {

template <typename T, bool kChannelsLast_>
struct MomentsBody {
  static constexpr bool kChannelsLast = kChannelsLast_;
  static constexpr int kAhead = 4, kBlocks = 1;
  using A = wide_t<T>;
  using State = Spread<A, kChannelsLast>;

  Operand x;

  template <bool kWhole>
  __device__ __forceinline__ Nothing cache(const At&) const {
    return {};
  }

  template <bool kWhole>
  __device__ __forceinline__ void visit(const Nothing&, const At& at, State& state) const {
    Group<T> group;
    group.template load<kWhole>(x.data, at.in(x), at.valid);
    A values[kLanes];
#pragma unroll
    for (int k = 0; k < kLanes; ++k)
      values[k] = group[k];
    state.add(values, at.valid);
  }
};

template <typename R>
__device__ __forceinline__ void blend(void* running, int64_t i, double value, double momentum) {
  R* at = static_cast<R*>(running) + i;
  const double old = static_cast<double>(widen(*at));
  *at = narrow<R>(static_cast<wide_t<R>>(old + momentum * (value - old)));
}

template <typename R>
__device__ __forceinline__ void update(const RunningStats& stats, const RunningStatsUpdate& u, double momentum) {
  const auto value = [&](const void* from, int64_t c) {
    return u.is_double ? static_cast<const double*>(from)[c] : double(static_cast<const float*>(from)[c]);
  };
  for (int64_t c = threadIdx.x; c < stats.channels; c += blockDim.x) {
    blend<R>(stats.mean, c * stats.mean_stride, value(u.mean, c), momentum);
    blend<R>(stats.var, c * stats.var_stride, u.unbias * value(u.var, c), momentum);
  }
}

// A block to each BatchNorm, because all of its channels read the counter before it is advanced.
__global__ void __launch_bounds__(kThreads) update_stats(const __grid_constant__ RunningStatsUpdate u) {
  const RunningStats& stats = u.stats[blockIdx.x];
  double momentum = u.momentum;
  if (momentum < 0) momentum = 1.0 / double(*stats.batches + 1);
  __syncthreads();
  if (threadIdx.x == 0 && stats.batches) ++*stats.batches;
  switch (stats.dtype) {
    case Dtype::kFloat: return update<float>(stats, u, momentum);
    case Dtype::kDouble: return update<double>(stats, u, momentum);
    case Dtype::kBFloat16: return update<__nv_bfloat16>(stats, u, momentum);
    case Dtype::kHalf: return update<__half>(stats, u, momentum);
  }
}

}  // namespace

void channel_moments(Dtype dtype, const Shape& s, const Operand& x, const Moments& moments, const Queue& queue) {
  for_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    Alignment aligned(sizeof(T), s);
    aligned.add(x);
    if (s.channels_last)
      run_moments(MomentsBody<T, true>{x}, s, aligned, false, moments, queue);
    else
      run_moments(MomentsBody<T, false>{x}, s, aligned, false, moments, queue);
  });
}

void update_running_stats(const RunningStatsUpdate& update, const Queue& queue) {
  launch(update_stats, dim3(unsigned(update.size)), dim3(kThreads), queue.stream, update);
}

}  // namespace rkfast::cuda
