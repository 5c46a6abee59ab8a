// x W^T + b + residual. See linear_residual.cu.
#pragma once

#include <driver_types.h>

#include <cstdint>

#include "csrc/common/dtype.h"

namespace persimmon_fast::cuda {

struct LinearResidualParams {
  const void* x;         // [num_rows, in_features], rows x_row_stride elements apart
  const void* weight;    // [out_features, in_features], rows weight_row_stride elements apart
  const void* bias;      // [out_features]; null: none
  const void* residual;  // [num_rows, out_features], rows residual_row_stride elements apart
  void* out;             // [num_rows, out_features] contiguous
  int64_t num_rows;
  int64_t in_features;  // > 0
  int64_t out_features;
  int64_t x_row_stride;
  int64_t weight_row_stride;
  int64_t residual_row_stride;
  int num_multiprocessors;
  DType dtype;  // of every tensor
};

// Enqueues on `stream`; neither allocates nor synchronises.
cudaError_t launch_linear_residual(const LinearResidualParams& params, cudaStream_t stream);

}  // namespace persimmon_fast::cuda
