// The parts of relu(x U^T + b_u)^2 D^T + b_d. See squared_relu_mlp.cpp.
#pragma once

#include <cstdint>

#include "csrc/common/types.h"
#include "csrc/cpu/isa.h"
#include "csrc/cpu/stream.h"

namespace persimmon_fast::cpu {

struct SquaredReluUpParams {
  StreamParams product;  // its out: the hidden activation [num_rows, intermediate_size], overwritten with relu^2
  const void* bias;      // [intermediate_size]; null: none
  uint8_t* active;       // [intermediate_size]: 1 where any row is nonzero or NaN, else 0
};

// Up to kMaxStreamRows rows. Work items: neurons.
PF_CPU_KERNEL(squared_relu_up, SquaredReluUpParams)

constexpr int64_t kDownColumns = 64;  // output features in one work item of squared_relu_down

struct SquaredReluDownParams {
  const float* hidden;    // [num_rows, intermediate_size] contiguous
  const int32_t* active;  // [num_active]: neurons to multiply, ascending
  const void* weight;     // D as one row of hidden_size elements per neuron, rows neuron_stride elements apart
  const void* bias;       // [hidden_size]; null: none
  const void* residual;   // [num_rows, hidden_size], rows residual_row_stride elements apart; null: none
  float* sums;            // [num_rows, hidden_size] contiguous, scratch
  void* out;              // as sums
  int64_t num_rows;       // 1 .. kMaxStreamRows
  int64_t intermediate_size;
  int64_t hidden_size;
  int64_t num_active;
  int64_t neuron_stride;
  int64_t residual_row_stride;
  DType dtype;  // of weight, bias, residual, out
};

// Work items: blocks of kDownColumns output features.
PF_CPU_KERNEL(squared_relu_down, SquaredReluDownParams)

// For many rows, whose products are torch's:
struct SquaredReluRowsParams {
  void* hidden;    // [num_rows, intermediate_size] contiguous, overwritten with relu^2 / unscale[row]
  float* unscale;  // [num_rows]: a power of two, 1 unless the square of the row's largest value overflows fp16
  int64_t intermediate_size;
  DType dtype;
};

// Work items: rows.
PF_CPU_KERNEL(squared_relu_rows, SquaredReluRowsParams)

struct ScaledBiasResidualParams {
  void* out;             // [num_rows, hidden_size] contiguous, overwritten with out * unscale[row] + bias + residual
  const float* unscale;  // [num_rows]
  const void* bias;      // [hidden_size]; null: none
  const void* residual;  // [num_rows, hidden_size], rows residual_row_stride elements apart; null: none
  int64_t hidden_size;
  int64_t residual_row_stride;
  DType dtype;
};

// Work items: rows.
PF_CPU_KERNEL(scaled_bias_residual, ScaledBiasResidualParams)

}  // namespace persimmon_fast::cpu
