// residual + x W^T + b for up to 16 rows. See linear_residual.cpp.
#pragma once

#include <cstdint>

#include "csrc/common/types.h"
#include "csrc/cpu/isa.h"
#include "csrc/cpu/stream.h"

namespace persimmon_fast::cpu {

struct LinearResidualParams {
  StreamParams product;  // its out: scratch
  const void* bias;      // [out_features]; null: none
  const void* residual;  // [num_rows, out_features], rows residual_row_stride elements apart; null: none
  void* out;             // as residual, rows out_row_stride elements apart
  int64_t residual_row_stride;
  int64_t out_row_stride;
};

// Work items: output features. Every tensor has the dtype of product.weight.
PF_CPU_KERNEL(linear_residual, LinearResidualParams)

}  // namespace persimmon_fast::cpu
