// What the layer_norm kernels of every backend take.
#pragma once

#include <cstdint>

#include "csrc/common/dtype.h"

namespace persimmon_fast {

struct LayerNormParams {
  const void* x;         // [num_rows, hidden_size], rows x_row_stride elements apart
  const void* residual;  // as x with residual_row_stride; null: none
  const void* weight;    // [hidden_size]
  const void* bias;      // [hidden_size]
  void* sum;             // [num_rows, hidden_size] contiguous: x + residual; null when residual is
  void* out;             // [num_rows, hidden_size] contiguous
  int64_t num_rows;
  int64_t hidden_size;
  int64_t x_row_stride;
  int64_t residual_row_stride;
  float eps;
  DType dtype;  // of every tensor
};

}  // namespace persimmon_fast
