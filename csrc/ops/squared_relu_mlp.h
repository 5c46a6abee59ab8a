// squared_relu_mlp of every device: arguments, checks, the empty output (which is all of the Meta kernel).
#pragma once

#include "csrc/ops/checks.h"
#include "csrc/ops/input_norm.h"

namespace persimmon_fast {

struct MlpArgs {
  const at::Tensor& x;
  const at::Tensor& up_weight;
  const OptionalTensor& up_bias;
  const at::Tensor& down_weight;
  const OptionalTensor& down_bias;
  const OptionalTensor& residual;
  InputNorm norm;
};

inline void check_mlp(const MlpArgs& a) {
  const char* op = "squared_relu_mlp";
  check_float(op, "x", a.x);
  check_shape(op, "x", a.x, {-1, -1}, "[num_rows, hidden_size]");
  const c10::SymInt hidden_size = a.x.sym_size(1);
  TORCH_CHECK_VALUE(hidden_size > 0, op, ": x must have hidden_size > 0, got ", a.x.sym_sizes());
  check_dense_rows(op, "x", a.x);
  check_same(op, "up_weight", a.up_weight, "x", a.x);
  check_shape(op, "up_weight", a.up_weight, {-1, hidden_size}, "[intermediate_size, hidden_size]");
  const c10::SymInt intermediate_size = a.up_weight.sym_size(0);
  TORCH_CHECK_VALUE(intermediate_size > 0, op, ": up_weight must have intermediate_size > 0, got ",
                    a.up_weight.sym_sizes());
  check_dense_rows(op, "up_weight", a.up_weight);
  if (a.up_bias.has_value()) {
    check_same(op, "up_bias", *a.up_bias, "x", a.x);
    check_shape(op, "up_bias", *a.up_bias, {intermediate_size}, "[intermediate_size]");
    check_dense_rows(op, "up_bias", *a.up_bias);
  }
  check_same(op, "down_weight", a.down_weight, "x", a.x);
  check_shape(op, "down_weight", a.down_weight, {hidden_size, intermediate_size}, "[hidden_size, intermediate_size]");
  TORCH_CHECK_VALUE(hidden_size == 1 || intermediate_size == 1 || a.down_weight.sym_stride(0) == 1 ||
                        a.down_weight.sym_stride(1) == 1,
                    op, ": down_weight must have a dimension of stride 1, got strides ", a.down_weight.sym_strides());
  if (a.down_bias.has_value()) {
    check_same(op, "down_bias", *a.down_bias, "x", a.x);
    check_shape(op, "down_bias", *a.down_bias, {hidden_size}, "[hidden_size]");
    check_dense_rows(op, "down_bias", *a.down_bias);
  }
  if (a.residual.has_value()) {
    check_same(op, "residual", *a.residual, "x", a.x);
    check_shape(op, "residual", *a.residual, {a.x.sym_size(0), hidden_size}, "[num_rows, hidden_size]");
    check_dense_rows(op, "residual", *a.residual);
  }
  check_input_norm(op, a.norm, a.x);
}

inline bool is_neuron_major(const at::Tensor& down_weight) {
  return down_weight.size(0) == 1 || down_weight.stride(0) == 1;
}

inline int64_t row_stride_or_zero(const OptionalTensor& t) { return t.has_value() ? t->stride(0) : 0; }

inline at::Tensor squared_relu_mlp_meta(const at::Tensor& x, const at::Tensor& up_weight, const OptionalTensor& up_bias,
                                        const at::Tensor& down_weight, const OptionalTensor& down_bias,
                                        const OptionalTensor& residual, const OptionalTensor& norm_weight,
                                        const OptionalTensor& norm_bias, double norm_eps) {
  check_mlp({x, up_weight, up_bias, down_weight, down_bias, residual, {norm_weight, norm_bias, norm_eps}});
  return at::empty_symint({x.sym_size(0), x.sym_size(1)}, x.options());
}

}  // namespace persimmon_fast
