// linear_residual of every device: checks, the empty output (which is all of the Meta kernel).
#pragma once

#include "csrc/ops/checks.h"

namespace persimmon_fast {

inline void check_linear_residual(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                                  const at::Tensor& residual) {
  const char* op = "linear_residual";
  check_float(op, "x", x);
  TORCH_CHECK_VALUE(x.dim() == 2, op, ": x must be [num_rows, in_features], got ", x.sym_sizes());
  TORCH_CHECK_VALUE(x.sym_size(1) > 0, op, ": x must have in_features > 0, got ", x.sym_sizes());
  check_dense_rows(op, "x", x);
  check_same(op, "weight", weight, "x", x);
  check_shape(op, "weight", weight, {-1, x.sym_size(1)}, "[out_features, in_features]");
  check_dense_rows(op, "weight", weight);
  if (bias.has_value()) {
    check_same(op, "bias", *bias, "x", x);
    check_shape(op, "bias", *bias, {weight.sym_size(0)}, "[out_features]");
    check_dense_rows(op, "bias", *bias);
  }
  check_same(op, "residual", residual, "x", x);
  check_shape(op, "residual", residual, {x.sym_size(0), weight.sym_size(0)}, "[num_rows, out_features]");
  check_dense_rows(op, "residual", residual);
}

inline at::Tensor linear_residual_meta(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                                       const at::Tensor& residual) {
  check_linear_residual(x, weight, bias, residual);
  return at::empty_symint({x.sym_size(0), weight.sym_size(0)}, x.options());
}

}  // namespace persimmon_fast
