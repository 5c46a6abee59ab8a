// linear_residual on a CPU: threads, and torch's product for many rows.
#include "csrc/ops/linear_residual.h"

#include <ATen/ops/linear.h>
#include <torch/library.h>

#include "csrc/cpu/linear_residual.h"
#include "csrc/ops/stream.h"

namespace persimmon_fast {
namespace {

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
