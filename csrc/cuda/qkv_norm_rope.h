// The QKV projection with bias, LayerNorm of q and k, rotary embedding and cache write. See qkv_norm_rope.cu.
#pragma once

#include <driver_types.h>

#include "csrc/common/norm_rope_params.h"
#include "csrc/cuda/stream_plan.h"

namespace persimmon_fast::cuda {

struct QkvNormRopeParams {
  NormRopeParams head;
  const void* x;       // [num_tokens, hidden_size], rows x_row_stride elements apart
  const void* weight;  // [num_heads * 3 * head_dim, hidden_size], rows weight_row_stride elements apart; per head its
                       // q, k and v rows
  const void* bias;    // [num_heads * 3 * head_dim]; null: none
  StreamNorm norm;     // of x; none where stream_normalises(num_tokens, hidden_size, .., head_dim) is false
  QkvOutputs out;
  int64_t hidden_size;
  int64_t x_row_stride;
  int64_t weight_row_stride;
  int num_multiprocessors;  // of the device
};

// Enqueues on `stream`; neither allocates nor synchronises. head_dim: 64 or 128. num_tokens may be 0.
cudaError_t launch_qkv_norm_rope(const QkvNormRopeParams& params, cudaStream_t stream);

}  // namespace persimmon_fast::cuda
