// What the kernels of qk_norm_rope and qkv_norm_rope take on every backend.
#pragma once

#include <cstdint>

#include "csrc/common/dtype.h"

namespace persimmon_fast {

// The largest head of any backend: the CPU kernels hold one in fp32 on the stack.
constexpr int64_t kMaxHeadDim = 256;

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
  int64_t num_tokens;
  int64_t num_heads;
  int64_t head_dim;    // <= kMaxHeadDim; CUDA: 64 or 128
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

// Where a QKV projection goes.
struct QkvOutputs {
  void* q;                      // [num_tokens, num_heads, head_dim] contiguous
  void* k;                      // [num_pages, num_heads, page_size, head_dim] contiguous
  void* v;                      // as k
  const int64_t* slot_mapping;  // [num_tokens]: page * page_size + offset, negative: not kept. Null: k and v are
                                // [num_tokens, num_heads, head_dim], which is a cache with pages of one token
  int64_t page_size;            // 1 where slot_mapping is null
};

}  // namespace persimmon_fast
