// What dense_block asks of the vectorised kernels, a few rows of channels_last slots at a time. Everything is float; vectors
// per channel are padded to kPad.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"

namespace rkfast {

// Rows of some channels: `data` is their first element, `pitch` the elements from row to row.
template <typename T>
struct Slot {
  T* data = nullptr;
  int64_t pitch = 0;

  Slot row(int64_t i) const { return {data + i * pitch, pitch}; }
  Slot column(int64_t c) const { return {data + c, pitch}; }
};

// out = relu(scale * x + shift)
struct NormaliseRows {
  Slot<const float> x;
  int64_t rows, channels;
  const float *scale, *shift;
  Slot<float> out;
};

// Mean and sum of squared deviations of each channel, in double.
struct MomentsOfRows {
  Slot<const float> x;
  int64_t rows, channels;
  double *mean, *m2;
};

// out = keep_scale * keep * (grad + slope * (x - center) + offset), without what is null. `transposed` [channels][pitch]
// gets the same.
struct FinishRows {
  Slot<const float> grad, x;
  int64_t rows, channels;
  const float *center, *slope, *offset;
  Slot<const bool> keep;
  float keep_scale;
  Slot<float> out;
};

// With g = grad where act is not <= 0: sums[0] += sum g, sums[1] += sum g * (x - center), and, where there is a `total`,
// total += scale * g. `grad` becomes g where it is to be kept.
struct ReadBackwardRows {
  Slot<const float> act, grad, x;
  int64_t rows, channels;
  const float *scale, *center;
  double* sums[2];
  Slot<float> total, masked;
};

// out[c][i] = x[i][c]
struct TransposeRows {
  Slot<const float> x;
  int64_t rows, channels;
  Slot<float> out;
};

extern Dispatch<NormaliseRows> normalise_rows;
extern Dispatch<MomentsOfRows> moments_of_rows;
extern Dispatch<FinishRows> finish_rows;
extern Dispatch<ReadBackwardRows> read_backward_rows;
extern Dispatch<TransposeRows> transpose_rows;

}  // namespace rkfast
