// squared_relu_mlp on CUDA: scratch, launches.
#include "csrc/ops/squared_relu_mlp.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "csrc/cuda/squared_relu_mlp.h"
#include "csrc/ops/cuda/device.h"
#include "csrc/ops/cuda/streamed_input.h"

namespace persimmon_fast {
namespace {

at::Tensor squared_relu_mlp_cuda(const at::Tensor& x, const at::Tensor& up_weight, const OptionalTensor& up_bias,
                                 const at::Tensor& down_weight, const OptionalTensor& down_bias,
                                 const OptionalTensor& residual, const OptionalTensor& norm_weight,
                                 const OptionalTensor& norm_bias, double norm_eps) {
  const DeviceGuard guard(x.device());
  at::Tensor out =
      squared_relu_mlp_meta(x, up_weight, up_bias, down_weight, down_bias, residual, norm_weight, norm_bias, norm_eps);
  if (out.numel() == 0) return out;
  cuda::SquaredReluMlpParams p{};
  p.num_rows = x.size(0);
  p.hidden_size = x.size(1);
  p.intermediate_size = up_weight.size(0);
  p.down_is_neuron_major = is_neuron_major(down_weight);
  p.down_row_stride = down_weight.stride(p.down_is_neuron_major ? 1 : 0);
  p.num_multiprocessors = num_multiprocessors();
  p.dtype = dtype_tag(x);
  const InputNorm norm{norm_weight, norm_bias, norm_eps};
  StreamedInput input;
  at::Tensor scratch, row_max;
  if (const int64_t bytes = cuda::skip_scratch_bytes(p); bytes > 0) {
    input = streamed_input(x, norm, cuda::kUpUnit);
    scratch = at::empty({bytes}, x.options().dtype(at::kByte));
    p.skip_scratch = scratch.mutable_data_ptr();
  } else {
    input.x = normalised_cuda(x, norm);
    scratch = at::empty({p.num_rows, p.intermediate_size}, x.options());
    p.hidden = scratch.mutable_data_ptr();
    if (x.scalar_type() == at::kHalf) {
      row_max = at::zeros({p.num_rows}, x.options().dtype(at::kInt));
      p.row_max = static_cast<uint32_t*>(row_max.mutable_data_ptr());
    }
  }
  p.x = input.x.const_data_ptr();
  p.x_row_stride = input.x.stride(0);
  p.norm = input.norm;
  p.up_weight = up_weight.const_data_ptr();
  p.up_row_stride = up_weight.stride(0);
  p.up_bias = data_or_null(up_bias);
  p.down_weight = down_weight.const_data_ptr();
  p.down_bias = data_or_null(down_bias);
  p.residual = data_or_null(residual);
  p.residual_row_stride = row_stride_or_zero(residual);
  p.out = out.mutable_data_ptr();
  check_launch("squared_relu_mlp", cuda::launch_squared_relu_mlp(p, current_stream()));
  return out;
}

}  // namespace

PF_CUDA_LIBRARY_IMPL(m) { m.impl("squared_relu_mlp", squared_relu_mlp_cuda); }

}  // namespace persimmon_fast
