// flash_attention of every device: checks, empty outputs (which is all of the Meta kernel).
#pragma once

#include <tuple>

#include "csrc/ops/attention_checks.h"

namespace persimmon_fast {

inline constexpr const char* kFlashAttention = "flash_attention";

inline void check_flash_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                  const at::Tensor& cu_seqlens_q, const at::Tensor& cu_seqlens_k,
                                  const OptionalTensor& seqused_k) {
  check_heads(kFlashAttention, q);
  check_same(kFlashAttention, "k", k, "q", q);
  check_shape(kFlashAttention, "k", k, {-1, q.sym_size(1), q.sym_size(2)}, "[total_k, num_heads, head_dim]");
  check_dense_rows(kFlashAttention, "k", k);
  check_same(kFlashAttention, "v", v, "q", q);
  check_shape(kFlashAttention, "v", v, {k.sym_size(0), q.sym_size(1), q.sym_size(2)}, "[total_k, num_heads, head_dim]");
  check_dense_rows(kFlashAttention, "v", v);
  check_index(kFlashAttention, "cu_seqlens_q", cu_seqlens_q, q, {-1}, "[batch_size + 1]");
  TORCH_CHECK_VALUE(cu_seqlens_q.sym_size(0) >= 1, kFlashAttention, ": cu_seqlens_q must be [batch_size + 1], got [0]");
  check_index(kFlashAttention, "cu_seqlens_k", cu_seqlens_k, q, {cu_seqlens_q.sym_size(0)}, "[batch_size + 1]");
  if (seqused_k.has_value()) {
    check_index(kFlashAttention, "seqused_k", *seqused_k, q, {cu_seqlens_q.sym_size(0) - 1}, "[batch_size]");
  }
}

inline std::tuple<at::Tensor, at::Tensor> flash_attention_meta(const at::Tensor& q, const at::Tensor& k,
                                                               const at::Tensor& v, const at::Tensor& cu_seqlens_q,
                                                               const at::Tensor& cu_seqlens_k,
                                                               const OptionalTensor& seqused_k, c10::SymInt,
                                                               c10::SymInt, double, bool) {
  check_flash_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k);
  return {at::empty_symint(q.sym_sizes(), q.options()),
          at::empty_symint({q.sym_size(1), q.sym_size(0)}, q.options().dtype(at::kFloat))};
}

}  // namespace persimmon_fast
