// paged_attention of every device: checks, empty output (which is all of the Meta kernel).
#pragma once

#include "csrc/ops/attention_checks.h"

namespace persimmon_fast {

inline constexpr const char* kPagedAttention = "paged_attention";

inline void check_cache(const char* name, const at::Tensor& cache, const c10::SymInt& num_pages, const at::Tensor& q,
                        const c10::SymInt& page_size) {
  check_same(kPagedAttention, name, cache, "q", q);
  check_shape(kPagedAttention, name, cache, {num_pages, q.sym_size(1), page_size, q.sym_size(2)},
              "[num_pages, num_heads, page_size, head_dim]");
  TORCH_CHECK_VALUE(cache.is_contiguous(), kPagedAttention, ": ", name, " must be contiguous, got strides ",
                    cache.sym_strides());
}

inline void check_paged_attention(const at::Tensor& q, const at::Tensor& k_cache, const at::Tensor& v_cache,
                                  const at::Tensor& page_table, const at::Tensor& cache_seqlens,
                                  const at::Tensor& cu_seqlens_q) {
  check_heads(kPagedAttention, q);
  check_cache("k_cache", k_cache, -1, q, -1);
  TORCH_CHECK_VALUE(k_cache.sym_size(2) > 0, kPagedAttention, ": k_cache must have page_size > 0, got ",
                    k_cache.sym_sizes());
  check_cache("v_cache", v_cache, k_cache.sym_size(0), q, k_cache.sym_size(2));
  check_index(kPagedAttention, "page_table", page_table, q, {-1, -1}, "[batch_size, max_pages]");
  check_index(kPagedAttention, "cache_seqlens", cache_seqlens, q, {page_table.sym_size(0)}, "[batch_size]");
  check_index(kPagedAttention, "cu_seqlens_q", cu_seqlens_q, q, {page_table.sym_size(0) + 1}, "[batch_size + 1]");
}

inline at::Tensor paged_attention_meta(const at::Tensor& q, const at::Tensor& k_cache, const at::Tensor& v_cache,
                                       const at::Tensor& page_table, const at::Tensor& cache_seqlens,
                                       const at::Tensor& cu_seqlens_q, c10::SymInt, double) {
  check_paged_attention(q, k_cache, v_cache, page_table, cache_seqlens, cu_seqlens_q);
  return at::empty_symint(q.sym_sizes(), q.options());
}

}  // namespace persimmon_fast
