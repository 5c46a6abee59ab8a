// LayerNorm over rows, optionally of a sum. See layer_norm.cu.
#pragma once

#include <driver_types.h>

#include "csrc/common/layer_norm_params.h"

namespace persimmon_fast::cuda {

// Enqueues on `stream`; neither allocates nor synchronises. Needs hidden_size > 0; num_rows may be 0.
cudaError_t launch_layer_norm(const LayerNormParams& params, cudaStream_t stream);

}  // namespace persimmon_fast::cuda
