#include "cuda/backward.cuh"
#include "cuda/weighted_sum.cuh"

namespace rkfast::cuda {
namespace {

// dx = scale * g' + slope * (x - mean) + offset, and the terms' gradients; with kSums also sum(g') and
// sum(g' * (x - mean)), while slope and offset, which need them, are zero.
template <typename T, bool kChannelsLast_, bool kSums>
struct NormBackwardBody {
  static constexpr bool kChannelsLast = kChannelsLast_;
  static constexpr int kAhead = kSums ? 2 : 1, kBlocks = 1;
  using A = wide_t<T>;
  using Vec = Channel<A, kChannelsLast>;
  using State = std::conditional_t<kSums, Sums<A, kChannelsLast>, Nothing>;

  struct Cached {
    Folded<A, kChannelsLast> norm;
    Vec slope, offset;
  };

  NormBackward args;
  Vector slope, offset;
  int64_t channels, mask_inner, mask_pitch;

  template <bool kWhole>
  __device__ __forceinline__ Cached cache(const At& at) const {
    Cached c;
    c.norm = Folded<A, kChannelsLast>::template load<kWhole>(args.norm, at, channels);
    if constexpr (!kSums) {
      c.slope = Vec::template load<kWhole>(slope, at, channels, A(0));
      c.offset = Vec::template load<kWhole>(offset, at, channels, A(0));
    }
    return c;
  }

  template <bool kWhole>
  __device__ __forceinline__ void visit(const Cached& c, const At& at, State& state) const {
    Group<T> grad, x;
    grad.template load<kWhole>(args.grad.data, at.in(args.grad), at.valid);
    x.template load<kWhole>(args.norm.x.data, at.in(args.norm.x), at.valid);
    const unsigned bits = mask_bits(args.mask, at, mask_inner, mask_pitch);
    const bool recompute = args.relu && !args.mask;
    A g[kLanes];
#pragma unroll
    for (int k = 0; k < kLanes; ++k) {
      // As it was stored: what rounds to zero was cut off too.
      const bool keep = recompute ? !(widen(narrow<T>(c.norm(k, x[k]))) <= A(0)) : bits >> k & 1;
      g[k] = keep && k < at.valid ? grad[k] : A(0);
    }
    if constexpr (kSums) {
#pragma unroll
      for (int k = 0; k < kLanes; ++k)
        state.add(k, g[k], k < at.valid ? g[k] * (x[k] - c.norm.mean[k]) : A(0));
    }
    if (args.dx.data) {
      Group<T> dx;
#pragma unroll
      for (int k = 0; k < kLanes; ++k) {
        A d = c.norm.scale[k] * g[k];
        if constexpr (!kSums) d += c.slope[k] * (x[k] - c.norm.mean[k]) + c.offset[k];
        dx.set(k, d);
      }
      dx.template store<kWhole>(args.dx.data, at.in(args.dx), at.valid);
    }
    write_gradients<T, kChannelsLast, kWhole>(args.grads, args.out, args.coeff, nullptr, g, at, channels);
  }
};

// Everything per channel between the two passes: s0 = sum(g'), s1 = sum(g' * x_hat).
template <typename A>
__global__ void __launch_bounds__(kMergeWidth* kMergeHeight)
    finish_norm(const Pair<A>* partials, Slots slots, Norm norm, A count, A* dweight, A* dbias, A* dstep, A* slope,
                A* offset) {
  const int64_t c = int64_t(blockIdx.x) * kMergeWidth + threadIdx.x;
  const bool exists = c < slots.channels;
  const auto value = [&](const Vector& v, A otherwise) {
    return exists && v.data ? static_cast<const A*>(v.data)[c] : otherwise;
  };
  const A rstd = inverse_std(value(norm.var, A(1)), A(norm.eps)), weight = value(norm.weight, A(1)),
          bias = value(norm.bias, A(0));
  const A* steps = static_cast<const A*>(norm.step.data);
  Pair<A> all;  // of step * s0 and step * s1
  if (exists) {
    for (int64_t n = threadIdx.y; n < slots.samples; n += kMergeHeight) {
      Pair<A> own;
      for (int64_t i = 0; i < slots.per_sample; ++i)
        own.merge(partials[(n * slots.per_sample + i) * slots.channels + c]);
      own.second *= rstd;
      if (norm.step.per_sample) {
        if (dstep) dstep[n * slots.channels + c] = weight * own.second + bias * own.first;
        own.first *= steps[n * slots.channels + c];
        own.second *= steps[n * slots.channels + c];
      }
      all.merge(own);
    }
  }
  all = merge_block(all);
  if (!exists || threadIdx.y != 0) return;
  if (!norm.step.per_sample) {
    if (dstep) dstep[c] = weight * all.second + bias * all.first;
    const A step = value(norm.step, A(1));
    all.first *= step;
    all.second *= step;
  }
  if (dweight) dweight[c] = all.second;
  if (dbias) dbias[c] = all.first;
  if (slope) {
    const Correction<A> correction = correct(rstd, weight, all.first, all.second, count);
    slope[c] = correction.slope;
    offset[c] = correction.offset;
  }
}

template <typename T, bool kChannelsLast>
void run_backward(const Shape& s, const NormBackward& args, const Queue& queue) {
  using A = wide_t<T>;
  const bool two_passes = args.batch_stats && args.dx.data;
  NormBackward first = args;
  if (two_passes) {
    first.dx = {};
    first.grads = 0;
  }
  Alignment aligned(sizeof(T), s);
  for (const Operand& x : {args.grad, args.norm.x, args.dx})
    aligned.add(x);
  for (int i = 0; i < args.grads; ++i)
    aligned.add(args.out[i]);
  for (const Vector& v : {args.norm.mean, args.norm.var, args.norm.weight, args.norm.bias, args.norm.step})
    aligned.add(v);

  A *slope = nullptr, *offset = nullptr;
  if (two_passes || args.dweight || args.dstep) {
    const Tiling t = tile(s, aligned, args.norm.step.per_sample, true);
    const Slots found = slots(t, kChannelsLast);
    auto* partials =
        static_cast<Pair<A>*>(queue.allocate(found.samples * found.per_sample * found.channels * sizeof(Pair<A>)));
    if (two_passes) {
      slope = static_cast<A*>(queue.allocate(s.channels * sizeof(A)));
      offset = static_cast<A*>(queue.allocate(s.channels * sizeof(A)));
    }
    run_sweep(NormBackwardBody<T, kChannelsLast, true>{first, {}, {}, s.channels, t.mask_inner, t.mask_pitch}, t,
              partials, queue);
    launch(finish_norm<A>, merge_grid(s.channels), dim3(kMergeWidth, kMergeHeight), queue.stream,
           static_cast<const Pair<A>*>(partials), found, args.norm, A(s.samples * s.positions),
           static_cast<A*>(args.dweight), static_cast<A*>(args.dbias), static_cast<A*>(args.dstep), slope, offset);
    if (!two_passes) return;
  }
  const Tiling t = tile(s, aligned, kChannelsLast && args.norm.step.per_sample, false);
  run_sweep(NormBackwardBody<T, kChannelsLast, false>{args, {slope}, {offset}, s.channels, t.mask_inner, t.mask_pitch},
            t, nullptr, queue);
}

}  // namespace

void bn_rk_sum(Dtype dtype, const Shape& s, const WeightedSum& sum, const Moments& moments, const Queue& queue) {
  weighted_sum<true>(dtype, s, sum, moments, queue);
}

void bn_rk_sum_backward(Dtype dtype, const Shape& s, const NormBackward& args, const Queue& queue) {
  for_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (s.channels_last)
      run_backward<T, true>(s, args, queue);
    else
      run_backward<T, false>(s, args, queue);
  });
}

}  // namespace rkfast::cuda
