// The QKV projection with bias, LayerNorm of q and k, rotary embedding and cache write. See qkv_norm_rope.cpp.
#pragma once

#include <cstdint>

#include "csrc/cpu/isa.h"
#include "csrc/cpu/qk_norm_rope.h"
#include "csrc/cpu/stream.h"

namespace persimmon_fast::cpu {

struct QkvNormRopeParams {
  NormRopeParams head;
  StreamParams product;         // of qkv_norm_rope; its out: scratch [num_rows, num_heads * 3 * head_dim]
  const void* bias;             // [num_heads * 3 * head_dim], of qkv_norm_rope; null: none
  const void* projection;       // [num_tokens, num_heads * 3 * head_dim] contiguous, bias included, of qkv_epilogue
  void* q;                      // [num_tokens, num_heads, head_dim] contiguous
  void* k;                      // [num_pages, num_heads, page_size, head_dim] contiguous
  void* v;                      // as k
  const int64_t* slot_mapping;  // [num_tokens]: page * page_size + offset, negative: not kept. Null: k and v are
                                // [num_tokens, num_heads, head_dim], which is a cache with pages of one token
  int64_t page_size;            // 1 where slot_mapping is null
};

// Product and epilogue. Work items: heads, for all of at most kMaxStreamRows tokens.
PF_CPU_KERNEL(qkv_norm_rope, QkvNormRopeParams)

// The epilogue of a projection that exists. Work items: (token, head) pairs, the head fastest.
PF_CPU_KERNEL(qkv_epilogue, QkvNormRopeParams)

}  // namespace persimmon_fast::cpu
