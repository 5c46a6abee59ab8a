// Descriptions of tensors for TMA (Hopper's copies of tiles by hardware), in the form that kernels take as parameters.
#pragma once

#include <cuda.h>
#include <driver_types.h>

#include <cstdint>

namespace persimmon_fast::cuda {

constexpr int kMaxTensorRank = 5;

// A tensor of 16-bit elements and the box that one copy moves. Dimension 0 is dense. What a box holds outside the
// tensor arrives as zeros and is not stored. In shared memory a box is dense, dimension 0 first, with its 16-byte
// pieces swizzled for rows of 128 bytes: piece c of a row at c ^ (row % 8), rows counted from the box, which must begin
// at a multiple of 1,024 bytes.
struct TensorBox {
  const void* base;                // 16-byte aligned
  int rank;                        // 1 .. kMaxTensorRank
  int64_t size[kMaxTensorRank];    // elements
  int64_t stride[kMaxTensorRank];  // elements, multiples of 8; [0] is 1
  int box[kMaxTensorRank];         // 1 .. 256 elements; box[0] is 64: the swizzle permutes 128 bytes
};

// A matrix whose rows lie row_stride elements apart; a box is `box_rows` rows of 64 columns.
inline TensorBox matrix_box(const void* base, int64_t rows, int64_t columns, int64_t row_stride, int box_rows) {
  return {base, 2, {columns, rows}, {1, row_stride}, {64, box_rows}};
}

// Whether TMA can address it.
bool is_encodable(const TensorBox& tensor);

// Fills `map`; no CUDA call that synchronises. cudaErrorNotSupported where the driver has no TMA.
cudaError_t encode_tensor_map(const TensorBox& tensor, CUtensorMap& map);

}  // namespace persimmon_fast::cuda
