// LayerNorm over head_dim and rotary embedding of q and k. See qk_norm_rope.cu.
#pragma once

#include <driver_types.h>

#include "csrc/common/norm_rope_params.h"

namespace persimmon_fast::cuda {

// Enqueues on `stream`; neither allocates nor synchronises. head_dim: 64 or 128. num_tokens and num_heads may be 0.
cudaError_t launch_qk_norm_rope(const QkNormRopeParams& params, cudaStream_t stream);

}  // namespace persimmon_fast::cuda
