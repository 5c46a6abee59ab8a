// Checks and parameters that qk_norm_rope and qkv_norm_rope share: LayerNorm weights per head, table, positions.
#pragma once

#include <ATen/core/Tensor.h>

#include "csrc/common/norm_rope_params.h"
#include "csrc/ops/checks.h"

namespace persimmon_fast {

struct NormRopeArgs {
  const OptionalTensor& q_weight;
  const OptionalTensor& q_bias;
  const OptionalTensor& k_weight;
  const OptionalTensor& k_bias;
  const at::Tensor& cos_sin;
  const at::Tensor& position_ids;
  double eps;
};

inline void check_head_norm(const char* op, const char* name, const OptionalTensor& t, const char* like_name,
                            const at::Tensor& like, const c10::SymInt& num_heads, const c10::SymInt& head_dim) {
  if (!t.has_value()) return;
  check_same(op, name, *t, like_name, like);
  const bool shared = t->dim() == 1 && t->sym_size(0) == head_dim;
  const bool per_head = t->dim() == 2 && t->sym_size(0) == num_heads && t->sym_size(1) == head_dim;
  TORCH_CHECK_VALUE(shared || per_head, op, ": ", name, " must be [head_dim=", head_dim, "] or [num_heads=", num_heads,
                    ", head_dim=", head_dim, "], got ", t->sym_sizes());
  TORCH_CHECK_VALUE(t->is_contiguous(), op, ": ", name, " must be contiguous, got strides ", t->sym_strides());
}

// like: the tensor that decides dtype and device.
inline void check_norm_rope(const char* op, const NormRopeArgs& a, const char* like_name, const at::Tensor& like,
                            const c10::SymInt& num_tokens, const c10::SymInt& num_heads, const c10::SymInt& head_dim) {
  TORCH_CHECK_VALUE(head_dim > 0 && head_dim <= kMaxHeadDim, op, ": head_dim must be 1 .. ", kMaxHeadDim, ", got ",
                    head_dim);
  const bool norm = a.q_weight.has_value();
  TORCH_CHECK_VALUE(
      a.q_bias.has_value() == norm && a.k_weight.has_value() == norm && a.k_bias.has_value() == norm, op,
      ": q_weight, q_bias, k_weight and k_bias must be given together or not at all, got None for some of them");
  check_head_norm(op, "q_weight", a.q_weight, like_name, like, num_heads, head_dim);
  check_head_norm(op, "q_bias", a.q_bias, like_name, like, num_heads, head_dim);
  check_head_norm(op, "k_weight", a.k_weight, like_name, like, num_heads, head_dim);
  check_head_norm(op, "k_bias", a.k_bias, like_name, like, num_heads, head_dim);
  if (norm) {
    TORCH_CHECK_VALUE(a.q_weight->dim() == a.q_bias->dim(), op,
                      ": q_bias must have the shape of q_weight = ", a.q_weight->sym_sizes(), ", got ",
                      a.q_bias->sym_sizes());
    TORCH_CHECK_VALUE(a.k_weight->dim() == a.k_bias->dim(), op,
                      ": k_bias must have the shape of k_weight = ", a.k_weight->sym_sizes(), ", got ",
                      a.k_bias->sym_sizes());
  }
  check_device(op, "cos_sin", a.cos_sin, like_name, like);
  check_dtype(op, "cos_sin", a.cos_sin, at::kFloat);
  check_shape(op, "cos_sin", a.cos_sin, {-1, -1}, "[num_positions, rotary_dim]");
  check_dense_rows(op, "cos_sin", a.cos_sin);
  const c10::SymInt rotary_dim = a.cos_sin.sym_size(1);
  TORCH_CHECK_VALUE(rotary_dim > 0 && rotary_dim % 2 == 0 && rotary_dim <= head_dim, op,
                    ": cos_sin must have an even number of columns, 2 .. head_dim=", head_dim, ", got ",
                    a.cos_sin.sym_sizes());
  check_device(op, "position_ids", a.position_ids, like_name, like);
  check_dtype(op, "position_ids", a.position_ids, at::kLong);
  check_shape(op, "position_ids", a.position_ids, {num_tokens}, "[num_tokens]");
  check_dense_rows(op, "position_ids", a.position_ids);
}

// Reads values: for CPU tensors.
inline void check_positions_cpu(const char* op, const NormRopeArgs& a) {
  const int64_t num_positions = a.cos_sin.size(0);
  const int64_t* positions = a.position_ids.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < a.position_ids.size(0); ++i) {
    TORCH_CHECK_VALUE(positions[i] >= 0 && positions[i] < num_positions, op, ": position_ids[", i, "] = ", positions[i],
                      " is outside the table: cos_sin has positions 0 .. ", num_positions - 1);
  }
}

inline HeadNorm head_norm(const OptionalTensor& weight, const OptionalTensor& bias) {
  const bool per_head = weight.has_value() && weight->dim() == 2;
  return {data_or_null(weight), data_or_null(bias), per_head ? weight->size(1) : 0};
}

inline NormRopeParams norm_rope_params(const NormRopeArgs& a, int64_t num_heads, int64_t head_dim, DType dtype) {
  NormRopeParams p{};
  p.q_norm = head_norm(a.q_weight, a.q_bias);
  p.k_norm = head_norm(a.k_weight, a.k_bias);
  p.cos_sin = a.cos_sin.const_data_ptr<float>();
  p.position_ids = a.position_ids.const_data_ptr<int64_t>();
  p.cos_sin_row_stride = a.cos_sin.stride(0);
  p.num_tokens = a.position_ids.size(0);
  p.num_heads = num_heads;
  p.head_dim = head_dim;
  p.rotary_dim = a.cos_sin.size(1);
  p.eps = static_cast<float>(a.eps);
  p.dtype = dtype;
  return p;
}

// (token, head) pairs per task: about 16K elements pay for waking a thread.
inline int64_t head_grain(int64_t elements_per_head) { return std::max<int64_t>(1, 16384 / elements_per_head); }

}  // namespace persimmon_fast
