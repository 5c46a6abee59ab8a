// Softmax attention of many queries, keys contiguous or paged. See flash_attention.cu.
#pragma once

#include <driver_types.h>

#include "csrc/cuda/attention_params.h"

namespace persimmon_fast::cuda {

// Blocks of the launch, from metadata alone.
int64_t flash_attention_num_blocks(const AttentionParams& params);

// Enqueues on `stream`; neither allocates nor synchronises. Needs head_dim 64 or 128 and fewer than 2^31 blocks.
cudaError_t launch_flash_attention(const AttentionParams& params, cudaStream_t stream);

}  // namespace persimmon_fast::cuda
