// The LayerNorm of an op's input that the op does itself: qkv_norm_rope and squared_relu_mlp take the residual stream
// and normalise it first. The result is rounded to the dtype, so it has the bits of layer_norm and the op after it.
#pragma once

#include "csrc/ops/checks.h"

namespace persimmon_fast {

// weight, bias: [hidden_size], or none for an input that is taken as it is.
struct InputNorm {
  const OptionalTensor& weight;
  const OptionalTensor& bias;
  double eps;
};

inline void check_input_norm(const char* op, const InputNorm& norm, const at::Tensor& x) {
  TORCH_CHECK_VALUE(norm.weight.has_value() == norm.bias.has_value(), op,
                    ": norm_weight and norm_bias must be given together, got only ",
                    norm.weight.has_value() ? "norm_weight" : "norm_bias");
  if (!norm.weight.has_value()) return;
  check_same(op, "norm_weight", *norm.weight, "x", x);
  check_shape(op, "norm_weight", *norm.weight, {x.sym_size(1)}, "[hidden_size]");
  check_dense_rows(op, "norm_weight", *norm.weight);
  check_same(op, "norm_bias", *norm.bias, "x", x);
  check_shape(op, "norm_bias", *norm.bias, {x.sym_size(1)}, "[hidden_size]");
  check_dense_rows(op, "norm_bias", *norm.bias);
}

// LayerNorm(x), or x where there is none, of inputs that have been checked.
at::Tensor normalised_cpu(const at::Tensor& x, const InputNorm& norm);

}  // namespace persimmon_fast
