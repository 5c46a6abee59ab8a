// linear_residual: checks, allocation, threads, and torch's product for many rows.
#include <ATen/ops/linear.h>
#include <torch/library.h>

#include "csrc/cpu/linear_residual.h"
#include "csrc/ops/checks.h"
#include "csrc/ops/stream.h"

namespace persimmon_fast {
namespace {

void check_linear_residual(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
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

at::Tensor linear_residual_meta(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                                const at::Tensor& residual) {
  check_linear_residual(x, weight, bias, residual);
  return at::empty_symint({x.sym_size(0), weight.sym_size(0)}, x.options());
}

at::Tensor linear_residual_cpu(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                               const at::Tensor& residual) {
  const int64_t num_rows = x.dim() == 2 ? x.size(0) : 0;
  if (num_rows > cpu::kMaxStreamRows) {
    check_linear_residual(x, weight, bias, residual);
    return at::linear(x, weight, bias).add_(residual);
  }
  at::Tensor out = linear_residual_meta(x, weight, bias, residual);
  if (out.numel() == 0) return out;
  const at::Tensor packed = pack_activations(x);
  const at::Tensor sums = fp32_scratch(out.numel());
  cpu::LinearResidualParams p{};
  p.product = stream_params(packed, num_rows, weight, sums);
  p.bias = data_or_null(bias);
  p.residual = residual.const_data_ptr();
  p.out = out.mutable_data_ptr();
  p.residual_row_stride = residual.stride(0);
  p.out_row_stride = out.stride(0);
  at::parallel_for(0, weight.size(0), cpu::stream_grain(weight.size(1)),
                   [&](int64_t begin, int64_t end) { cpu::linear_residual(p, begin, end); });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(persimmon_fast, Meta, m) { m.impl("linear_residual", linear_residual_meta); }

TORCH_LIBRARY_IMPL(persimmon_fast, CPU, m) { m.impl("linear_residual", linear_residual_cpu); }

}  // namespace persimmon_fast
