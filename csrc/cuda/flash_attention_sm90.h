// Softmax attention of many queries on sm_90a. See flash_attention_sm90.cu.
#pragma once

#include <driver_types.h>

#include "csrc/cuda/attention_params.h"

namespace persimmon_fast::cuda {

// Whether launch_flash_attention_sm90 takes them; launch_flash_attention's kernels take all.
bool flash_attention_sm90_takes(const AttentionParams& params);

// Enqueues on `stream`; neither allocates nor synchronises.
cudaError_t launch_flash_attention_sm90(const AttentionParams& params, cudaStream_t stream);

}  // namespace persimmon_fast::cuda
