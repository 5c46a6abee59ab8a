// The QKV projection with bias, LayerNorm of q and k, rotary embedding and cache write. See qkv_norm_rope.cpp.
#pragma once

#include "csrc/common/norm_rope_params.h"
#include "csrc/cpu/isa.h"
#include "csrc/cpu/stream.h"

namespace persimmon_fast::cpu {

struct QkvNormRopeParams {
  NormRopeParams head;
  StreamParams product;    // of qkv_norm_rope; its out: scratch [num_rows, num_heads * 3 * head_dim]
  const void* bias;        // [num_heads * 3 * head_dim], of qkv_norm_rope; null: none
  const void* projection;  // [num_tokens, num_heads * 3 * head_dim] contiguous, bias included, of qkv_epilogue
  QkvOutputs out;
};

// Product and epilogue. Work items: heads, for all of at most kMaxStreamRows tokens.
PF_CPU_KERNEL(qkv_norm_rope, QkvNormRopeParams)

// The epilogue of a projection that exists. Work items: (token, head) pairs, the head fastest.
PF_CPU_KERNEL(qkv_epilogue, QkvNormRopeParams)

}  // namespace persimmon_fast::cpu
