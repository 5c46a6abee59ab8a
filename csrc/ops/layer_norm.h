// layer_norm, add_layer_norm of every device: checks, empty outputs (which is all of the Meta kernel), parameters.
#pragma once

#include <tuple>

#include "csrc/common/layer_norm_params.h"
#include "csrc/ops/checks.h"

namespace persimmon_fast {

inline void check_layer_norm(const char* op, const at::Tensor& x, const at::Tensor* residual, const at::Tensor& weight,
                             const at::Tensor& bias) {
  check_float(op, "x", x);
  TORCH_CHECK_VALUE(x.dim() == 2, op, ": x must be [num_rows, hidden_size], got ", x.sym_sizes());
  const c10::SymInt hidden_size = x.sym_size(1);
  TORCH_CHECK_VALUE(hidden_size > 0, op, ": x must have hidden_size > 0, got ", x.sym_sizes());
  check_dense_rows(op, "x", x);
  if (residual != nullptr) {
    check_same(op, "residual", *residual, "x", x);
    check_shape(op, "residual", *residual, {x.sym_size(0), hidden_size}, "[num_rows, hidden_size]");
    check_dense_rows(op, "residual", *residual);
  }
  check_same(op, "weight", weight, "x", x);
  check_shape(op, "weight", weight, {hidden_size}, "[hidden_size]");
  check_dense_rows(op, "weight", weight);
  check_same(op, "bias", bias, "x", x);
  check_shape(op, "bias", bias, {hidden_size}, "[hidden_size]");
  check_dense_rows(op, "bias", bias);
}

inline at::Tensor empty_like_rows(const at::Tensor& x) {
  return at::empty_symint({x.sym_size(0), x.sym_size(1)}, x.options());
}

inline LayerNormParams layer_norm_params(const at::Tensor& x, const at::Tensor* residual, const at::Tensor& weight,
                                         const at::Tensor& bias, double eps, const at::Tensor& out,
                                         const at::Tensor* sum) {
  LayerNormParams p{};
  p.x = x.const_data_ptr();
  p.residual = residual != nullptr ? residual->const_data_ptr() : nullptr;
  p.weight = weight.const_data_ptr();
  p.bias = bias.const_data_ptr();
  p.sum = sum != nullptr ? sum->mutable_data_ptr() : nullptr;
  p.out = out.mutable_data_ptr();
  p.num_rows = x.size(0);
  p.hidden_size = x.size(1);
  p.x_row_stride = x.stride(0);
  p.residual_row_stride = residual != nullptr ? residual->stride(0) : 0;
  p.eps = static_cast<float>(eps);
  p.dtype = dtype_tag(x);
  return p;
}

inline at::Tensor layer_norm_meta(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, double) {
  check_layer_norm("layer_norm", x, nullptr, weight, bias);
  return empty_like_rows(x);
}

inline std::tuple<at::Tensor, at::Tensor> add_layer_norm_meta(const at::Tensor& x, const at::Tensor& residual,
                                                              const at::Tensor& weight, const at::Tensor& bias,
                                                              double) {
  check_layer_norm("add_layer_norm", x, &residual, weight, bias);
  return {empty_like_rows(x), empty_like_rows(x)};
}

}  // namespace persimmon_fast
