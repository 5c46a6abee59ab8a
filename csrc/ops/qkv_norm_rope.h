// qkv_norm_rope, qkv_norm_rope_paged of every device: checks, empty outputs (which is all of the Meta kernel),
// parameters.
#pragma once

#include <tuple>

#include "csrc/common/norm_rope_params.h"
#include "csrc/ops/checks.h"
#include "csrc/ops/input_norm.h"
#include "csrc/ops/norm_rope.h"

namespace persimmon_fast {

struct Paged {
  const at::Tensor& slot_mapping;
  const at::Tensor& k_cache;
  const at::Tensor& v_cache;
};

// Returns head_dim.
inline c10::SymInt check_qkv_norm_rope(const char* op, const at::Tensor& x, const at::Tensor& weight,
                                       const OptionalTensor& bias, const NormRopeArgs& a, int64_t num_heads,
                                       const InputNorm& norm) {
  check_float(op, "x", x);
  check_shape(op, "x", x, {-1, -1}, "[num_tokens, hidden_size]");
  TORCH_CHECK_VALUE(x.sym_size(1) > 0, op, ": x must have hidden_size > 0, got ", x.sym_sizes());
  check_dense_rows(op, "x", x);
  TORCH_CHECK_VALUE(num_heads > 0, op, ": num_heads must be positive, got ", num_heads);
  check_same(op, "weight", weight, "x", x);
  check_shape(op, "weight", weight, {-1, x.sym_size(1)}, "[num_heads * 3 * head_dim, hidden_size]");
  const c10::SymInt rows = weight.sym_size(0);
  TORCH_CHECK_VALUE(rows % (3 * num_heads) == 0, op, ": weight must be [num_heads * 3 * head_dim, hidden_size] with ",
                    "num_heads=", num_heads, ", got ", weight.sym_sizes());
  check_dense_rows(op, "weight", weight);
  if (bias.has_value()) {
    check_same(op, "bias", *bias, "x", x);
    check_shape(op, "bias", *bias, {rows}, "[num_heads * 3 * head_dim]");
    check_dense_rows(op, "bias", *bias);
  }
  const c10::SymInt head_dim = rows / (3 * num_heads);
  check_norm_rope(op, a, "x", x, x.sym_size(0), num_heads, head_dim);
  check_input_norm(op, norm, x);
  return head_dim;
}

inline void check_paged(const char* op, const at::Tensor& x, const c10::SymInt& num_heads, const c10::SymInt& head_dim,
                        const Paged& paged) {
  check_device(op, "slot_mapping", paged.slot_mapping, "x", x);
  check_dtype(op, "slot_mapping", paged.slot_mapping, at::kLong);
  check_shape(op, "slot_mapping", paged.slot_mapping, {x.sym_size(0)}, "[num_tokens]");
  check_dense_rows(op, "slot_mapping", paged.slot_mapping);
  const char* layout = "[num_pages, num_heads, page_size, head_dim]";
  check_same(op, "k_cache", paged.k_cache, "x", x);
  check_shape(op, "k_cache", paged.k_cache, {-1, num_heads, -1, head_dim}, layout);
  check_same(op, "v_cache", paged.v_cache, "x", x);
  check_shape(op, "v_cache", paged.v_cache, {paged.k_cache.sym_size(0), num_heads, paged.k_cache.sym_size(2), head_dim},
              layout);
  TORCH_CHECK_VALUE(paged.k_cache.is_contiguous(), op, ": k_cache must be contiguous, got strides ",
                    paged.k_cache.sym_strides());
  TORCH_CHECK_VALUE(paged.v_cache.is_contiguous(), op, ": v_cache must be contiguous, got strides ",
                    paged.v_cache.sym_strides());
}

inline at::Tensor empty_heads(const at::Tensor& x, const c10::SymInt& num_heads, const c10::SymInt& head_dim) {
  return at::empty_symint({x.sym_size(0), num_heads, head_dim}, x.options());
}

inline QkvOutputs qkv_outputs(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  return {q.mutable_data_ptr(), k.mutable_data_ptr(), v.mutable_data_ptr(), nullptr, 1};
}

inline QkvOutputs qkv_outputs(const at::Tensor& q, const Paged& paged) {
  return {q.mutable_data_ptr(), paged.k_cache.mutable_data_ptr(), paged.v_cache.mutable_data_ptr(),
          paged.slot_mapping.const_data_ptr<int64_t>(), paged.k_cache.size(2)};
}

inline std::tuple<at::Tensor, at::Tensor, at::Tensor> qkv_norm_rope_meta(
    const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias, const OptionalTensor& q_weight,
    const OptionalTensor& q_bias, const OptionalTensor& k_weight, const OptionalTensor& k_bias,
    const at::Tensor& cos_sin, const at::Tensor& position_ids, double eps, int64_t num_heads,
    const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, double norm_eps) {
  const NormRopeArgs a{q_weight, q_bias, k_weight, k_bias, cos_sin, position_ids, eps};
  const c10::SymInt head_dim =
      check_qkv_norm_rope("qkv_norm_rope", x, weight, bias, a, num_heads, {norm_weight, norm_bias, norm_eps});
  return {empty_heads(x, num_heads, head_dim), empty_heads(x, num_heads, head_dim),
          empty_heads(x, num_heads, head_dim)};
}

inline at::Tensor qkv_norm_rope_paged_meta(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                                           const OptionalTensor& q_weight, const OptionalTensor& q_bias,
                                           const OptionalTensor& k_weight, const OptionalTensor& k_bias,
                                           const at::Tensor& cos_sin, const at::Tensor& position_ids, double eps,
                                           int64_t num_heads, const at::Tensor& slot_mapping, const at::Tensor& k_cache,
                                           const at::Tensor& v_cache, const OptionalTensor& norm_weight,
                                           const OptionalTensor& norm_bias, double norm_eps) {
  const char* op = "qkv_norm_rope_paged";
  const NormRopeArgs a{q_weight, q_bias, k_weight, k_bias, cos_sin, position_ids, eps};
  const c10::SymInt head_dim =
      check_qkv_norm_rope(op, x, weight, bias, a, num_heads, {norm_weight, norm_bias, norm_eps});
  check_paged(op, x, num_heads, head_dim, {slot_mapping, k_cache, v_cache});
  return empty_heads(x, num_heads, head_dim);
}

}  // namespace persimmon_fast
