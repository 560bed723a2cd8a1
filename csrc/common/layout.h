// The two memory layouts of the kernels; rkfast/ops/layout.py says the same in Python and explains it.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_strided.h>

#include <vector>

namespace rkfast {

// outer x inner x length elements: N x C x P contiguous, N x P x C channels_last, and where P = 1: either is the same
// memory, and the rows of the latter are longer.
struct Rows {
  int64_t samples, channels, positions;
  bool channels_last;

  Rows(const at::Tensor& x, bool channels_last)
      : samples(x.size(0)), channels(x.size(1)), positions(1), channels_last(channels_last) {
    for (int64_t d = 2; d < x.dim(); ++d) positions *= x.size(d);
    if (positions == 1) this->channels_last = true;
  }
  int64_t outer() const { return samples; }
  int64_t inner() const { return channels_last ? positions : channels; }
  int64_t length() const { return channels_last ? channels : positions; }
  int64_t numel() const { return samples * channels * positions; }
  int64_t count() const { return samples * positions; }  // values per channel
};

// Elements between neighbouring samples and between neighbouring rows.
struct Pitch {
  int64_t outer, inner;
};

// Whether x is dense, or a channel slice of something dense, in the layout asked for; fills in its pitch.
inline bool find_pitch(const at::Tensor& x, const Rows& r, Pitch& pitch) {
  const int64_t n = r.samples, c = r.channels, p = r.positions;
  int64_t step = 1;  // between neighbouring positions
  if (r.channels_last) {
    step = -1;
    for (int64_t d = x.dim() - 1; d >= 2 && step < 0; --d)
      if (x.size(d) != 1) step = x.stride(d);
    if (step < 0) step = n > 1 ? x.stride(0) : c;
    pitch = {p == 1 ? step : p * step, step};
    if (r.numel() == 0) return true;
    if ((c != 1 && x.stride(1) != 1) || step < c) return false;
    if (n > 1 && x.stride(0) != pitch.outer) return false;
  } else {
    pitch = {n > 1 ? x.stride(0) : c * p, p};
    if (r.numel() == 0) return true;
    if ((c != 1 && x.stride(1) != p) || pitch.outer < c * p) return false;
  }
  int64_t expected = step;
  for (int64_t d = x.dim() - 1; d >= 2; --d) {
    if (x.size(d) != 1 && x.stride(d) != expected) return false;
    expected *= x.size(d);
  }
  return true;
}

inline at::Tensor empty_rows(const at::Tensor& x, bool channels_last, at::ScalarType dtype) {
  if (!channels_last) return at::empty(x.sizes(), x.options().dtype(dtype).memory_format(at::MemoryFormat::Contiguous));
  std::vector<int64_t> strides(x.dim());
  int64_t step = 1;
  auto place = [&](int64_t d) {
    strides[d] = step;
    step *= std::max<int64_t>(x.size(d), 1);
  };
  place(1);
  for (int64_t d = x.dim() - 1; d >= 2; --d) place(d);
  place(0);
  return at::empty_strided(x.sizes(), strides, x.options().dtype(dtype));
}

inline at::Tensor empty_rows(const at::Tensor& x, bool channels_last) {
  return empty_rows(x, channels_last, x.scalar_type());
}

// x itself where its rows are evenly spaced in the layout asked for, else a dense copy of it in that layout.
inline at::Tensor conform(const at::Tensor& x, const Rows& r, Pitch& pitch) {
  if (find_pitch(x, r, pitch)) return x;
  at::Tensor copy = empty_rows(x, r.channels_last).copy_(x);
  find_pitch(copy, r, pitch);
  return copy;
}

inline int64_t mask_bytes(const Rows& r) { return (r.length() + 7) / 8; }

inline at::Tensor empty_mask(const at::Tensor& x, const Rows& r) {
  return at::empty({r.outer() * r.inner(), mask_bytes(r)}, x.options().dtype(at::kByte).memory_format(at::MemoryFormat::Contiguous));
}

// Vectors per channel, and every sum: float32, or float64 for float64 tensors.
inline at::ScalarType moments_dtype(at::ScalarType dtype) { return dtype == at::kDouble ? at::kDouble : at::kFloat; }

}  // namespace rkfast
