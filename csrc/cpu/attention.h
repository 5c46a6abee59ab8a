// Softmax attention over contiguous or paged keys. See attention.cpp.
#pragma once

#include <cstdint>

#include "csrc/common/types.h"
#include "csrc/cpu/isa.h"

namespace persimmon_fast::cpu {

constexpr int64_t kAttentionMaxHeadDim = 128;
constexpr int64_t kAttentionQueryBlock = 64;  // queries of one work item
// A sequence with few queries is cut into work items of kAttentionSplitKeys keys. Both numbers are constants, so
// that neither the batch nor the number of threads changes the order of a sum.
constexpr int64_t kAttentionMaxSplitQueries = 16;
constexpr int64_t kAttentionSplitKeys = 2048;

// One sequence of the batch.
struct AttentionSequence {
  int64_t q_begin;        // its first query, a row of q
  int64_t num_queries;    //
  int64_t k_begin;        // its first key, a row of k and v; unused with pages
  const int32_t* pages;   // its page ids; null: keys are contiguous
  int64_t num_keys;       //
  int64_t num_blocks;     // of queries: ceil(num_queries / kAttentionQueryBlock)
  int64_t num_splits;     // of keys: 1, or ceil(num_keys / kAttentionSplitKeys) with one block of queries
  int64_t first_item;     // work items are numbered by sequence, then split, head, block
  int64_t first_partial;  // index of its first partial result; used when num_splits > 1
};

struct AttentionParams {
  const AttentionSequence* sequences;  // [num_sequences]
  int64_t num_sequences;
  const void* q;  // [total_q, num_heads, head_dim]
  int64_t q_token_stride;
  int64_t q_head_stride;
  const void* k;  // [total_k, num_heads, head_dim], or pages [num_pages, num_heads, page_size, head_dim]
  const void* v;  // as k
  int64_t k_page_stride;
  int64_t k_token_stride;
  int64_t k_head_stride;
  int64_t v_page_stride;
  int64_t v_token_stride;
  int64_t v_head_stride;
  int64_t page_size;
  void* out;   // [total_q, num_heads, head_dim] contiguous
  float* lse;  // [num_heads, total_q] contiguous, or null
  int64_t total_q;
  // [num_partials][head_dim + 2]: weighted sum of v, score maximum, denominator; per sequence [head][query][split]
  float* partials;
  int64_t num_heads;
  int64_t head_dim;
  float softmax_scale;
  bool causal;  // bottom-right aligned
  DType dtype;  // of q, k, v, out
};

// Work items: sequence x head x block of queries x split of keys.
PF_CPU_KERNEL(attention, AttentionParams)

// Merges the partial results of the sequences that were split. Work items: sequence x head, all sequences.
PF_CPU_KERNEL(attention_combine, AttentionParams)

}  // namespace persimmon_fast::cpu
