// What convolutions ask of the vectorised kernels, a few rows of channels_last slots at a time. T is what slots hold, float or
// bfloat16, and G that or, of what a product leaves, float. Vectors per channel are float, padded to kPad.
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
template <typename G, typename T>
struct NormaliseRows {
  Slot<const G> x;
  int64_t rows, channels;
  const float *scale, *shift;
  Slot<T> out;
};

// Mean and sum of squared deviations of each channel, in double.
template <typename T>
struct MomentsOfRows {
  Slot<const T> x;
  int64_t rows, channels;
  double *mean, *m2;
};

// out = keep_scale * keep * (grad + slope * (x - center) + offset), without what is null.
template <typename G, typename T>
struct FinishRows {
  Slot<const G> grad;
  Slot<const T> x;
  int64_t rows, channels;
  const float *center, *slope, *offset;
  Slot<const bool> keep;
  float keep_scale;
  Slot<T> out;
};

// With g = grad where act is not <= 0: sums[0] += sum g and sums[1] += sum g * (x - center). With an act also total +=
// scale * g; without one, where it is scale * x + shift, masked = g, or scale * g where `scaled`.
template <typename G, typename T>
struct ReadBackwardRows {
  Slot<const T> act;
  Slot<const G> grad;
  Slot<const T> x;
  int64_t rows, channels;
  const float *scale, *shift, *center;
  double* sums[2];
  Slot<float> total;
  Slot<G> masked;
  bool scaled = false;
};

// out = x + other + shift, without what is null, and its ReLU where `relu`.
struct AddRows {
  Slot<const float> x, other;
  int64_t rows, channels;
  const float* shift;
  bool relu;
  Slot<float> out;
};

// out[c][i] = x[i][c], of any four bytes.
struct TransposeRows {
  Slot<const float> x;
  int64_t rows, channels;
  Slot<float> out;
};

// out[i / 2][c] = x[i][c] and x[i + 1][c] in its upper half, 0 beyond the last row.
struct PairRows {
  Slot<const uint16_t> x;
  int64_t rows, channels;
  Slot<uint32_t> out;
};

template <typename G, typename T>
inline Dispatch<NormaliseRows<G, T>> normalise_rows;
template <typename T>
inline Dispatch<MomentsOfRows<T>> moments_of_rows;
template <typename G, typename T>
inline Dispatch<FinishRows<G, T>> finish_rows;
template <typename G, typename T>
inline Dispatch<ReadBackwardRows<G, T>> read_backward_rows;
inline Dispatch<AddRows> add_rows;
inline Dispatch<TransposeRows> transpose_rows;
inline Dispatch<PairRows> pair_rows;

// Of winograd.h.

// out[16][plane] = B^T x B of `rows` x `columns` tiles, which begin two pixels apart.
struct TransformInput {
  const float* x;
  int64_t row_pitch, pixel_pitch, rows, columns, channels;
  float* out;
  int64_t plane;
};

// 2x2 pixels of each tile, A^T m A, as far as they are within the image.
struct TransformOutput {
  const float* m;
  int64_t plane, rows, columns, channels;
  float* out;
  int64_t row_pitch, pixel_pitch, height, width;  // of what is left of the image from the first tile on
};

// out[16][plane] = A g A^T of the 2x2 gradients of each tile, 0 outside of the image.
struct TransformGradient {
  const float* grad;
  int64_t row_pitch, pixel_pitch, height, width, rows, columns, channels;
  float* out;
  int64_t plane;
};

// sum [outputs][channels] += a^T b, of `rows` rows of outputs and of channels.
struct OuterProducts {
  const float *a, *b;
  int64_t rows, outputs, channels;
  float* sum;
};

// w [9][size] to G w G^T [16][size], or, backwards, d [16][size] to G^T d G [9][size]; planes lie a pitch apart.
struct TransformWeight {
  const float* from;
  int64_t from_pitch, size;
  float* to;
  int64_t to_pitch;
  bool backwards;
};

// Along rows, F(2, 3): tiles are 1x4 pixels that overlap by two. Channels and outputs lie in blocks of kLine.
constexpr int64_t kLine = 16;
inline int64_t lines(int64_t n) { return (n + kLine - 1) / kLine; }

// out [blocks of channels][columns][4][kLine] = B^T d of a row of 2 * columns + 2 pixels.
struct TransformRow {
  const float* x;
  int64_t columns, channels;
  float* out;

  static int64_t size(int64_t columns, int64_t channels) { return lines(channels) * columns * 4 * kLine; }
};

// w [9][outputs] of one channel to G w of each row: [blocks of outputs][3][channels][4][kLine], where `to` is its own.
struct TransformWeightRows {
  const float* from;
  int64_t from_pitch, outputs;
  float* to;
  int64_t channels;

  static int64_t size(int64_t channels, int64_t outputs) { return lines(outputs) * 12 * channels * kLine; }
};

// A row of results, of `width` pixels, from the three rows that it reads, whose sums stay in registers.
struct ConvolveRow {
  const float *rows[3], *weights;
  int64_t columns, channels, outputs;
  Slot<float> out;
  int64_t width;
};

// out [blocks of outputs][columns][4][kLine] = A g of a row's gradient, `width` pixels, 0 outside of the image.
struct TransformGradientRow {
  Slot<const float> grad;
  int64_t width, columns, outputs;
  float* out;
};

// sums [blocks of outputs][blocks of channels][4][kLine][3][kLine], the latter channels, += g^T of each of the three rows.
struct OuterRow {
  const float *rows[3], *grad;
  int64_t columns, channels, outputs;
  float* sums;

  static int64_t size(int64_t channels, int64_t outputs) { return lines(channels) * lines(outputs) * 12 * kLine * kLine; }
};

// Those sums to G^T d of each row: the gradient of a weight, rows of channels, one tap of the nine behind the other.
struct FinishOuterRow {
  const float* sums;
  int64_t channels, outputs;
  float* to;
  int64_t output_pitch, tap_pitch;
};

inline Dispatch<TransformInput> transform_input;
inline Dispatch<TransformGradientRow> transform_gradient_row;
inline Dispatch<OuterRow> outer_row;
inline Dispatch<FinishOuterRow> finish_outer_row;
inline Dispatch<TransformRow> transform_row;
inline Dispatch<ConvolveRow> convolve_row;
inline Dispatch<TransformWeightRows> transform_weight_rows;
inline Dispatch<TransformOutput> transform_output;
inline Dispatch<TransformGradient> transform_gradient;
inline Dispatch<OuterProducts> outer_products;
inline Dispatch<TransformWeight> transform_weight;

}  // namespace rkfast
