// relu(x U^T + b_u)^2 D^T + b_d (+ residual). See squared_relu_mlp.cu.
#pragma once

#include <driver_types.h>

#include <cstdint>

#include "csrc/common/dtype.h"
#include "csrc/cuda/stream_plan.h"

namespace persimmon_fast::cuda {

constexpr int kUpUnit = 32;  // neurons of a unit of the first product (stream.cuh) where zeros are skipped

struct SquaredReluMlpParams {
  const void* x;            // [num_rows, hidden_size], rows x_row_stride elements apart
  StreamNorm norm;          // of x; none unless zeros are skipped and stream_normalises(.., kUpUnit)
  const void* up_weight;    // [intermediate_size, hidden_size], rows up_row_stride elements apart
  const void* up_bias;      // [intermediate_size]; null: none
  const void* down_weight;  // [intermediate_size, hidden_size] if down_is_neuron_major, else [hidden_size,
                            // intermediate_size]; rows down_row_stride elements apart
  const void* down_bias;    // [hidden_size]; null: none
  const void* residual;     // [num_rows, hidden_size], rows residual_row_stride elements apart; null: none
  void* skip_scratch;       // skip_scratch_bytes(): zeros are skipped; null: they are multiplied, with these two
  void* hidden;             // [num_rows, intermediate_size] contiguous, scratch: relu, in fp32 its square
  uint32_t* row_max;        // [num_rows], scratch, zeros: fp16 bits of the largest value of a row; null unless fp16
  void* out;                // [num_rows, hidden_size] contiguous
  int64_t num_rows;
  int64_t hidden_size;        // > 0
  int64_t intermediate_size;  // > 0
  int64_t x_row_stride;
  int64_t up_row_stride;
  int64_t down_row_stride;
  int64_t residual_row_stride;
  bool down_is_neuron_major;
  int num_multiprocessors;
  DType dtype;  // of every tensor but row_max
};

// What skipping zeros needs as scratch, 16-byte aligned; 0 where it is not done: D must be neuron-major, the rows few.
int64_t skip_scratch_bytes(const SquaredReluMlpParams& params);

// Enqueues two kernels on `stream`; neither allocates nor synchronises.
cudaError_t launch_squared_relu_mlp(const SquaredReluMlpParams& params, cudaStream_t stream);

}  // namespace persimmon_fast::cuda
