// qkv_norm_rope, qkv_norm_rope_paged on CUDA: launches.
#include "csrc/ops/qkv_norm_rope.h"

#include "csrc/cuda/qkv_norm_rope.h"
#include "csrc/ops/cuda/device.h"
#include "csrc/ops/cuda/streamed_input.h"

namespace persimmon_fast {
namespace {

void run_cuda(const char* op, const QkvOutputs& out, const at::Tensor& x, const at::Tensor& weight,
              const OptionalTensor& bias, const NormRopeArgs& a, int64_t num_heads, const InputNorm& norm) {
  const int64_t head_dim = weight.size(0) / (3 * num_heads);
  check_head_dim_cuda(op, head_dim);
  const StreamedInput input = streamed_input(x, norm, head_dim);
  cuda::QkvNormRopeParams p{};
  p.head = norm_rope_params(a, num_heads, head_dim, dtype_tag(x));
  p.x = input.x.const_data_ptr();
  p.norm = input.norm;
  p.weight = weight.const_data_ptr();
  p.bias = data_or_null(bias);
  p.out = out;
  p.hidden_size = x.size(1);
  p.x_row_stride = input.x.stride(0);
  p.weight_row_stride = weight.stride(0);
  p.num_multiprocessors = num_multiprocessors();
  check_launch(op, cuda::launch_qkv_norm_rope(p, current_stream()));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> qkv_norm_rope_cuda(
    const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias, const OptionalTensor& q_weight,
    const OptionalTensor& q_bias, const OptionalTensor& k_weight, const OptionalTensor& k_bias,
    const at::Tensor& cos_sin, const at::Tensor& position_ids, double eps, int64_t num_heads,
    const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, double norm_eps) {
  const DeviceGuard guard(x.device());
  auto [q, k, v] = qkv_norm_rope_meta(x, weight, bias, q_weight, q_bias, k_weight, k_bias, cos_sin, position_ids, eps,
                                      num_heads, norm_weight, norm_bias, norm_eps);
  const NormRopeArgs a{q_weight, q_bias, k_weight, k_bias, cos_sin, position_ids, eps};
  run_cuda("qkv_norm_rope", qkv_outputs(q, k, v), x, weight, bias, a, num_heads, {norm_weight, norm_bias, norm_eps});
  return {q, k, v};
}

at::Tensor qkv_norm_rope_paged_cuda(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                                    const OptionalTensor& q_weight, const OptionalTensor& q_bias,
                                    const OptionalTensor& k_weight, const OptionalTensor& k_bias,
                                    const at::Tensor& cos_sin, const at::Tensor& position_ids, double eps,
                                    int64_t num_heads, const at::Tensor& slot_mapping, const at::Tensor& k_cache,
                                    const at::Tensor& v_cache, const OptionalTensor& norm_weight,
                                    const OptionalTensor& norm_bias, double norm_eps) {
  const DeviceGuard guard(x.device());
  at::Tensor q =
      qkv_norm_rope_paged_meta(x, weight, bias, q_weight, q_bias, k_weight, k_bias, cos_sin, position_ids, eps,
                               num_heads, slot_mapping, k_cache, v_cache, norm_weight, norm_bias, norm_eps);
  const NormRopeArgs a{q_weight, q_bias, k_weight, k_bias, cos_sin, position_ids, eps};
  run_cuda("qkv_norm_rope_paged", qkv_outputs(q, {slot_mapping, k_cache, v_cache}), x, weight, bias, a, num_heads,
           {norm_weight, norm_bias, norm_eps});
  return q;
}

}  // namespace

PF_CUDA_LIBRARY_IMPL(m) {
  m.impl("qkv_norm_rope", qkv_norm_rope_cuda);
  m.impl("qkv_norm_rope_paged", qkv_norm_rope_paged_cuda);
}

}  // namespace persimmon_fast
