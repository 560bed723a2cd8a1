#include "cuda/backward.cuh"
#include "cuda/weighted_sum.cuh"

namespace rkfast::cuda {
namespace {

// With kSums, also sum(g' * sum[0].term) and, where there are two, sum(g' * sum[1].term).
template <typename T, bool kChannelsLast_, bool kSums>
struct RkSumBackward {
  static constexpr bool kChannelsLast = kChannelsLast_;
  static constexpr int kAhead = 1, kBlocks = 1;
  using A = wide_t<T>;
  using State = std::conditional_t<kSums, Sums<A, kChannelsLast>, Nothing>;

  WeightedSumBackward args;
  int64_t channels, mask_inner, mask_pitch;

  template <bool kWhole>
  __device__ __forceinline__ Nothing cache(const At&) const {
    return {};
  }

  template <bool kWhole>
  __device__ __forceinline__ void factor(int i, const At& at, A (&values)[kLanes]) const {
    const Operand& term = args.sum[i].term;
    Group<T> group;
    if (i < args.sums && term.data) group.template load<kWhole>(term.data, at.in(term), at.valid);
#pragma unroll
    for (int k = 0; k < kLanes; ++k)
      values[k] = i >= args.sums ? A(0) : term.data ? group[k] : A(1);
  }

  template <bool kWhole>
  __device__ __forceinline__ void visit(const Nothing&, const At& at, State& state) const {
    Group<T> grad;
    grad.template load<kWhole>(args.grad.data, at.in(args.grad), at.valid);
    const unsigned bits = mask_bits(args.mask, at, mask_inner, mask_pitch);
    A g[kLanes];
#pragma unroll
    for (int k = 0; k < kLanes; ++k)
      g[k] = bits >> k & 1 ? grad[k] : A(0);
    if constexpr (kSums) {
      A first[kLanes], second[kLanes];
      factor<kWhole>(0, at, first);
      factor<kWhole>(1, at, second);
#pragma unroll
      for (int k = 0; k < kLanes; ++k)
        state.add(k, g[k] * first[k], args.sums > 1 ? g[k] * second[k] : A(0));
    }
    write_gradients<T, kChannelsLast, kWhole>(args.grads, args.out, args.coeff, args.step, g, at, channels);
  }
};

template <typename A>
struct Result {
  A* out = nullptr;
  A coeff = 0;
  bool per_sample = false;
};

template <typename A>
__global__ void __launch_bounds__(kMergeWidth* kMergeHeight)
    finish_sums(const Pair<A>* partials, Slots slots, Result<A> first, Result<A> second) {
  const int64_t c = int64_t(blockIdx.x) * kMergeWidth + threadIdx.x;
  Pair<A> all;
  if (c < slots.channels) {
    for (int64_t n = threadIdx.y; n < slots.samples; n += kMergeHeight) {
      Pair<A> own;
      for (int64_t i = 0; i < slots.per_sample; ++i)
        own.merge(partials[(n * slots.per_sample + i) * slots.channels + c]);
      if (first.per_sample) first.out[n * slots.channels + c] = first.coeff * own.first;
      if (second.per_sample) second.out[n * slots.channels + c] = second.coeff * own.second;
      all.merge(own);
    }
  }
  all = merge_block(all);
  if (c < slots.channels && threadIdx.y == 0) {
    if (first.out && !first.per_sample) first.out[c] = first.coeff * all.first;
    if (second.out && !second.per_sample) second.out[c] = second.coeff * all.second;
  }
}

template <typename T, bool kChannelsLast>
void run_backward(const Shape& s, const WeightedSumBackward& all, const Queue& queue) {
  using A = wide_t<T>;
  WeightedSumBackward args = all;
  // Two sums to a pass, the gradients in the first.
  for (int done = 0; done == 0 || done < all.sums; done += 2) {
    args.sums = std::min(all.sums - done, 2);
    args.grads = done == 0 ? all.grads : 0;
    Alignment aligned(sizeof(T), s);
    aligned.add(args.grad);
    bool by_sample = false;
    for (int i = 0; i < args.grads; ++i) {
      aligned.add(args.out[i]);
      aligned.add(args.step[i]);
      by_sample |= kChannelsLast && args.step[i].per_sample;
    }
    Result<A> results[2];
    for (int i = 0; i < args.sums; ++i) {
      const ChannelSum& sum = args.sum[i] = all.sum[done + i];
      aligned.add(sum.term);
      by_sample |= sum.per_sample;
      results[i] = {static_cast<A*>(sum.out), A(sum.coeff), sum.per_sample};
    }
    const Tiling t = tile(s, aligned, by_sample, args.sums > 0);
    if (args.sums == 0) {
      run_sweep(RkSumBackward<T, kChannelsLast, false>{args, s.channels, t.mask_inner, t.mask_pitch}, t, nullptr,
                queue);
      return;
    }
    const Slots found = slots(t, kChannelsLast);
    auto* partials =
        static_cast<Pair<A>*>(queue.allocate(found.samples * found.per_sample * found.channels * sizeof(Pair<A>)));
    run_sweep(RkSumBackward<T, kChannelsLast, true>{args, s.channels, t.mask_inner, t.mask_pitch}, t, partials, queue);
    launch(finish_sums<A>, merge_grid(s.channels), dim3(kMergeWidth, kMergeHeight), queue.stream,
           static_cast<const Pair<A>*>(partials), found, results[0], results[1]);
  }
}

}  // namespace

void rk_sum(Dtype dtype, const Shape& s, const WeightedSum& sum, const Moments& moments, const Queue& queue) {
  weighted_sum<false>(dtype, s, sum, moments, queue);
}

void rk_sum_backward(Dtype dtype, const Shape& s, const WeightedSumBackward& args, const Queue& queue) {
  for_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (s.channels_last)
      run_backward<T, true>(s, args, queue);
    else
      run_backward<T, false>(s, args, queue);
  });
}

}  // namespace rkfast::cuda
