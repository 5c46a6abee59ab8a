// What the attention kernels take: flash_attention.cu and paged_attention.cu.
#pragma once

#include <cstdint>

#include "csrc/common/dtype.h"

namespace persimmon_fast::cuda {

// Sequence b owns queries cu_seqlens_q[b] .. cu_seqlens_q[b + 1] and keys cu_seqlens_k[b] .. cu_seqlens_k[b + 1], or
// with a page table the first seqlens_k[b] keys of its pages. Strides count elements; last dimensions are dense.
struct AttentionParams {
  const void* q;  // [total_q, num_heads, head_dim]
  int64_t q_token_stride;
  int64_t q_head_stride;
  const void* k;  // [total_k, num_heads, head_dim], or pages [num_pages, num_heads, page_size, head_dim]
  int64_t k_token_stride;
  int64_t k_head_stride;
  const void* v;  // as k; pages lie as those of k
  int64_t v_token_stride;
  int64_t v_head_stride;
  void* out;                    // [total_q, num_heads, head_dim] contiguous
  float* lse;                   // [num_heads, total_q] contiguous, natural logarithm; null: not wanted
  const int32_t* cu_seqlens_q;  // [batch_size + 1]
  const int32_t* cu_seqlens_k;  // [batch_size + 1]; null with pages
  const int32_t* seqlens_k;     // [batch_size] keys that count; null: all
  const int32_t* page_table;    // [batch_size, max_pages]; null: keys are not paged
  int64_t page_table_stride;    // of its rows
  int64_t page_stride;          // of k and v, from page to page
  int32_t page_size;            // keys
  int32_t batch_size;
  int32_t num_heads;
  int32_t head_dim;  // 64 or 128
  int64_t total_q;
  int64_t total_k;       // rows of k and v; with a page table: pages
  int64_t max_seqlen_q;  // bounds every sequence's queries
  float softmax_scale;
  int32_t num_multiprocessors;  // of the device
  bool causal;                  // bottom-right aligned: the last query sees every key
  bool aligned;                 // q, k, v: every row 16-byte aligned. Set by the launchers
  DType dtype;                  // of q, k, v, out
  int32_t num_splits;           // paged_attention: ranges that the keys of a sequence are cut into, at most
  float* partial_out;           // [batch_size, max_seqlen_q, num_heads, num_splits, head_dim]; null with one split
  float* partial_stat;          // [batch_size, max_seqlen_q, num_heads, num_splits, 2]: score maximum, denominator
};

}  // namespace persimmon_fast::cuda
