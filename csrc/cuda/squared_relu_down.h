// out[m] = sum over the active neurons n of h[m, n]^2 D[n] + b_d (+ residual), up to 16 rows. See squared_relu_down.cu.
#pragma once

#include <driver_types.h>

#include <cstdint>

#include "csrc/common/ceil_div.h"
#include "csrc/common/dtype.h"
#include "csrc/cuda/stream_plan.h"

namespace persimmon_fast::cuda {

constexpr int64_t kMaxSkipRows = kStreamMaxRows;  // the first product is streamed
constexpr int64_t kNeuronsPerMask = 32;

constexpr int64_t dtype_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// How the kernel cuts its work: columns into slices, the list of active neurons into equal parts, one block for each
// pair; rows of the batch into groups of 16 bytes.
struct DownShape {
  static constexpr int64_t kSliceBytes = 512;

  int64_t slice_columns;
  int64_t num_slices;
  int64_t num_parts;
  int64_t rows_per_group;
  int64_t num_groups;  // 1, 2, or (fp32) 4
};

// As many blocks as multiprocessors at most, so that all of them are resident whatever else runs there.
constexpr DownShape down_shape(DType dtype, int64_t num_rows, int64_t hidden_size, int num_multiprocessors) {
  DownShape shape{};
  shape.slice_columns = DownShape::kSliceBytes / dtype_bytes(dtype);
  shape.num_slices = ceil_div(hidden_size, shape.slice_columns);
  const int64_t parts = num_multiprocessors / shape.num_slices;
  shape.num_parts = parts > 1 ? parts : 1;
  shape.rows_per_group = 16 / dtype_bytes(dtype);
  const int64_t groups = ceil_div(num_rows, shape.rows_per_group);
  shape.num_groups = groups == 3 ? 4 : groups;
  return shape;
}

// What the first product leaves for the second one, and what the second one's blocks leave for each other.
struct DownScratch {
  void* hidden;       // [intermediate_size, num_groups, rows_per_group] of dtype: relu in fp16, else relu^2
  uint32_t* active;   // [num_masks]: bit b of mask i is neuron 32 i + b, set where any row is nonzero
  uint16_t* largest;  // [num_masks, num_groups * 8], fp16: bits of each row's largest value among 32 neurons
  unsigned* arrived;  // [num_slices]: blocks that have written their partial sums; zeros before the second product
  float* partial;     // [num_slices, num_parts, num_rows, slice_columns]
};

// Cuts `base` into the arrays of DownScratch; returns the bytes that they take. base may be null.
inline int64_t cut_down_scratch(char* base, const DownShape& shape, DType dtype, int64_t num_rows,
                                int64_t intermediate_size, DownScratch& scratch) {
  int64_t offset = 0;
  const auto take = [&](int64_t bytes) {
    const int64_t begin = offset;
    offset += ceil_div<int64_t>(bytes, 16) * 16;
    return base == nullptr ? nullptr : base + begin;
  };
  const int64_t num_masks = ceil_div(intermediate_size, kNeuronsPerMask);
  scratch.hidden = take(intermediate_size * shape.num_groups * 16);
  scratch.active = reinterpret_cast<uint32_t*>(take(num_masks * 4));
  scratch.largest = reinterpret_cast<uint16_t*>(take(dtype == DType::kFloat16 ? num_masks * shape.num_groups * 16 : 0));
  scratch.arrived = reinterpret_cast<unsigned*>(take(shape.num_slices * 4));
  scratch.partial =
      reinterpret_cast<float*>(take(shape.num_slices * shape.num_parts * num_rows * shape.slice_columns * 4));
  return offset;
}

struct SquaredReluDownParams {
  DownShape shape;
  DownScratch scratch;
  const void* weight;    // D: [intermediate_size, hidden_size], rows weight_row_bytes apart
  const void* bias;      // [hidden_size]; null: none
  const void* residual;  // [num_rows, hidden_size], rows residual_row_stride elements apart; null: none
  void* out;             // [num_rows, hidden_size] contiguous
  int64_t residual_row_stride;
  int num_rows;     // 1 .. kMaxSkipRows
  int hidden_size;  // at most kMaxDownSize, as intermediate_size: 32-bit positions and columns
  int intermediate_size;
  int weight_row_bytes;
  DType dtype;  // of weight, bias, residual, out
};

constexpr int64_t kMaxDownSize = INT32_MAX - (1 << 16);

// Enqueues one kernel on `stream`; neither allocates nor synchronises.
cudaError_t launch_squared_relu_down(const SquaredReluDownParams& params, cudaStream_t stream);

}  // namespace persimmon_fast::cuda
