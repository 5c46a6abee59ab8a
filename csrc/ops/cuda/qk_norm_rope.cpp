// qk_norm_rope, qk_norm_rope_ on CUDA: launches.
#include "csrc/ops/qk_norm_rope.h"

#include "csrc/cuda/qk_norm_rope.h"
#include "csrc/ops/cuda/device.h"

namespace persimmon_fast {
namespace {

void run_cuda(const char* op, const at::Tensor& q, const at::Tensor& k, const NormRopeArgs& a, const at::Tensor& q_out,
              const at::Tensor& k_out) {
  check_head_dim_cuda(op, q.size(2));
  check_launch(op, cuda::launch_qk_norm_rope(qk_norm_rope_params(q, k, a, q_out, k_out), current_stream()));
}

std::tuple<at::Tensor, at::Tensor> qk_norm_rope_cuda(const at::Tensor& q, const at::Tensor& k,
                                                     const OptionalTensor& q_weight, const OptionalTensor& q_bias,
                                                     const OptionalTensor& k_weight, const OptionalTensor& k_bias,
                                                     const at::Tensor& cos_sin, const at::Tensor& position_ids,
                                                     double eps) {
  const DeviceGuard guard(q.device());
  auto [q_out, k_out] = qk_norm_rope_meta(q, k, q_weight, q_bias, k_weight, k_bias, cos_sin, position_ids, eps);
  run_cuda("qk_norm_rope", q, k, {q_weight, q_bias, k_weight, k_bias, cos_sin, position_ids, eps}, q_out, k_out);
  return {q_out, k_out};
}

void qk_norm_rope_in_place_cuda(const at::Tensor& q, const at::Tensor& k, const OptionalTensor& q_weight,
                                const OptionalTensor& q_bias, const OptionalTensor& k_weight,
                                const OptionalTensor& k_bias, const at::Tensor& cos_sin, const at::Tensor& position_ids,
                                double eps) {
  const DeviceGuard guard(q.device());
  const NormRopeArgs a{q_weight, q_bias, k_weight, k_bias, cos_sin, position_ids, eps};
  check_qk_norm_rope("qk_norm_rope_", q, k, a);
  check_written_in_place("qk_norm_rope_", q, k);
  run_cuda("qk_norm_rope_", q, k, a, q, k);
}

}  // namespace

PF_CUDA_LIBRARY_IMPL(m) {
  m.impl("qk_norm_rope", qk_norm_rope_cuda);
  m.impl("qk_norm_rope_", qk_norm_rope_in_place_cuda);
}

}  // namespace persimmon_fast
