// Softmax attention of a few queries per sequence over a paged cache. See paged_attention.cu.
#pragma once

#include <driver_types.h>

#include "csrc/cuda/attention_params.h"
#include "csrc/cuda/paged_attention_splits.h"

namespace persimmon_fast::cuda {

// Blocks of the larger of the launches, from metadata alone.
int64_t paged_attention_num_blocks(const AttentionParams& params);

// Enqueues on `stream`; neither allocates nor synchronises. Needs fp16 or bf16, head_dim 64 or 128, max_seqlen_q up to
// kPagedMaxQueries, num_splits >= 1 with partial_out and partial_stat where it is above 1, fewer than 2^31 blocks.
cudaError_t launch_paged_attention(const AttentionParams& params, cudaStream_t stream);

}  // namespace persimmon_fast::cuda
