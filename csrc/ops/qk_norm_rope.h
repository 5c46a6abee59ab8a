// qk_norm_rope, qk_norm_rope_ of every device: checks, empty outputs (which is all of the Meta kernel), parameters.
#pragma once

#include <ATen/MemoryOverlap.h>

#include <tuple>

#include "csrc/common/norm_rope_params.h"
#include "csrc/ops/checks.h"
#include "csrc/ops/norm_rope.h"

namespace persimmon_fast {

inline void check_qk_norm_rope(const char* op, const at::Tensor& q, const at::Tensor& k, const NormRopeArgs& a) {
  check_float(op, "q", q);
  check_shape(op, "q", q, {-1, -1, -1}, "[num_tokens, num_heads, head_dim]");
  check_dense_rows(op, "q", q);
  check_same(op, "k", k, "q", q);
  check_shape(op, "k", k, {q.sym_size(0), q.sym_size(1), q.sym_size(2)}, "[num_tokens, num_heads, head_dim]");
  check_dense_rows(op, "k", k);
  check_norm_rope(op, a, "q", q, q.sym_size(0), q.sym_size(1), q.sym_size(2));
}

inline void check_written_in_place(const char* op, const at::Tensor& q, const at::Tensor& k) {
  for (const auto& [name, t] : {std::pair<const char*, const at::Tensor&>{"q", q}, {"k", k}}) {
    TORCH_CHECK_VALUE(at::has_internal_overlap(t) != at::MemOverlap::Yes, op, ": ", name,
                      " is written in place and must not be an expanded tensor, got strides ", t.strides());
  }
}

inline QkNormRopeParams qk_norm_rope_params(const at::Tensor& q, const at::Tensor& k, const NormRopeArgs& a,
                                            const at::Tensor& q_out, const at::Tensor& k_out) {
  QkNormRopeParams p{};
  p.head = norm_rope_params(a, q.size(1), q.size(2), dtype_tag(q));
  p.q = q.const_data_ptr();
  p.k = k.const_data_ptr();
  p.q_out = q_out.mutable_data_ptr();
  p.k_out = k_out.mutable_data_ptr();
  p.q_token_stride = q.stride(0);
  p.q_head_stride = q.stride(1);
  p.k_token_stride = k.stride(0);
  p.k_head_stride = k.stride(1);
  p.q_out_token_stride = q_out.stride(0);
  p.q_out_head_stride = q_out.stride(1);
  p.k_out_token_stride = k_out.stride(0);
  p.k_out_head_stride = k_out.stride(1);
  return p;
}

inline std::tuple<at::Tensor, at::Tensor> qk_norm_rope_meta(const at::Tensor& q, const at::Tensor& k,
                                                            const OptionalTensor& q_weight,
                                                            const OptionalTensor& q_bias,
                                                            const OptionalTensor& k_weight,
                                                            const OptionalTensor& k_bias, const at::Tensor& cos_sin,
                                                            const at::Tensor& position_ids, double eps) {
  check_qk_norm_rope("qk_norm_rope", q, k, {q_weight, q_bias, k_weight, k_bias, cos_sin, position_ids, eps});
  return {at::empty_symint(q.sym_sizes(), q.options()), at::empty_symint(k.sym_sizes(), k.options())};
}

inline void qk_norm_rope_in_place_meta(const at::Tensor& q, const at::Tensor& k, const OptionalTensor& q_weight,
                                       const OptionalTensor& q_bias, const OptionalTensor& k_weight,
                                       const OptionalTensor& k_bias, const at::Tensor& cos_sin,
                                       const at::Tensor& position_ids, double eps) {
  check_qk_norm_rope("qk_norm_rope_", q, k, {q_weight, q_bias, k_weight, k_bias, cos_sin, position_ids, eps});
}

}  // namespace persimmon_fast
