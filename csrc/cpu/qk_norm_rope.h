// LayerNorm over head_dim and rotary embedding of q and k. See qk_norm_rope.cpp.
#pragma once

#include <cstdint>

#include "csrc/common/types.h"
#include "csrc/cpu/isa.h"

namespace persimmon_fast::cpu {

constexpr int64_t kMaxHeadDim = 256;  // one head in fp32 lies on the stack

struct HeadNorm {
  const void* weight;   // [head_dim] or [num_heads, head_dim] contiguous; null: no LayerNorm
  const void* bias;     // as weight
  int64_t head_stride;  // 0 or head_dim
};

struct NormRopeParams {
  HeadNorm q_norm;
  HeadNorm k_norm;
  const float* cos_sin;         // [num_positions, rotary_dim], rows cos_sin_row_stride apart
  const int64_t* position_ids;  // [num_tokens], within the table
  int64_t cos_sin_row_stride;
  int64_t num_heads;
  int64_t head_dim;    // <= kMaxHeadDim
  int64_t rotary_dim;  // even, <= head_dim
  float eps;
  DType dtype;  // of every tensor but cos_sin and position_ids
};

struct QkNormRopeParams {
  NormRopeParams head;
  const void* q;  // [num_tokens, num_heads, head_dim], the last dimension dense
  const void* k;  // as q
  void* q_out;    // as q; may be q itself
  void* k_out;    // as k; may be k itself
  int64_t q_token_stride, q_head_stride;
  int64_t k_token_stride, k_head_stride;
  int64_t q_out_token_stride, q_out_head_stride;
  int64_t k_out_token_stride, k_out_head_stride;
};

// Work items: (token, head) pairs, the head fastest.
PF_CPU_KERNEL(qk_norm_rope, QkNormRopeParams)

}  // namespace persimmon_fast::cpu
