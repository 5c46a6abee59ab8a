// linear_residual on CUDA: launches.
#include "csrc/ops/linear_residual.h"

#include "csrc/cuda/linear_residual.h"
#include "csrc/ops/cuda/device.h"

namespace persimmon_fast {
namespace {

at::Tensor linear_residual_cuda(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                                const at::Tensor& residual) {
  const DeviceGuard guard(x.device());
  at::Tensor out = linear_residual_meta(x, weight, bias, residual);
  cuda::LinearResidualParams p{};
  p.x = x.const_data_ptr();
  p.weight = weight.const_data_ptr();
  p.bias = data_or_null(bias);
  p.residual = residual.const_data_ptr();
  p.out = out.mutable_data_ptr();
  p.num_rows = x.size(0);
  p.in_features = x.size(1);
  p.out_features = weight.size(0);
  p.x_row_stride = x.stride(0);
  p.weight_row_stride = weight.stride(0);
  p.residual_row_stride = residual.stride(0);
  p.num_multiprocessors = num_multiprocessors();
  p.dtype = dtype_tag(x);
  check_launch("linear_residual", cuda::launch_linear_residual(p, current_stream()));
  return out;
}

}  // namespace

PF_CUDA_LIBRARY_IMPL(m) { m.impl("linear_residual", linear_residual_cuda); }

}  // namespace persimmon_fast
