// qk_norm_rope, qk_norm_rope_ on a CPU: threads.
#include "csrc/ops/qk_norm_rope.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include "csrc/cpu/qk_norm_rope.h"

namespace persimmon_fast {
namespace {

void run_cpu(const char* op, const at::Tensor& q, const at::Tensor& k, const NormRopeArgs& a, const at::Tensor& q_out,
             const at::Tensor& k_out) {
  check_positions_cpu(op, a);
  if (q.numel() == 0) return;
  const QkNormRopeParams p = qk_norm_rope_params(q, k, a, q_out, k_out);
  at::parallel_for(0, q.size(0) * q.size(1), head_grain(2 * q.size(2)),
                   [&](int64_t begin, int64_t end) { cpu::qk_norm_rope(p, begin, end); });
}

std::tuple<at::Tensor, at::Tensor> qk_norm_rope_cpu(const at::Tensor& q, const at::Tensor& k,
                                                    const OptionalTensor& q_weight, const OptionalTensor& q_bias,
                                                    const OptionalTensor& k_weight, const OptionalTensor& k_bias,
                                                    const at::Tensor& cos_sin, const at::Tensor& position_ids,
                                                    double eps) {
  auto [q_out, k_out] = qk_norm_rope_meta(q, k, q_weight, q_bias, k_weight, k_bias, cos_sin, position_ids, eps);
  run_cpu("qk_norm_rope", q, k, {q_weight, q_bias, k_weight, k_bias, cos_sin, position_ids, eps}, q_out, k_out);
  return {q_out, k_out};
}

void qk_norm_rope_in_place_cpu(const at::Tensor& q, const at::Tensor& k, const OptionalTensor& q_weight,
                               const OptionalTensor& q_bias, const OptionalTensor& k_weight,
                               const OptionalTensor& k_bias, const at::Tensor& cos_sin, const at::Tensor& position_ids,
                               double eps) {
  const NormRopeArgs a{q_weight, q_bias, k_weight, k_bias, cos_sin, position_ids, eps};
  check_qk_norm_rope("qk_norm_rope_", q, k, a);
  check_written_in_place("qk_norm_rope_", q, k);
  run_cpu("qk_norm_rope_", q, k, a, q, k);
}

}  // namespace

TORCH_LIBRARY_IMPL(persimmon_fast, Meta, m) {
  m.impl("qk_norm_rope", qk_norm_rope_meta);
  m.impl("qk_norm_rope_", qk_norm_rope_in_place_meta);
}

TORCH_LIBRARY_IMPL(persimmon_fast, CPU, m) {
  m.impl("qk_norm_rope", qk_norm_rope_cpu);
  m.impl("qk_norm_rope_", qk_norm_rope_in_place_cpu);
}

}  // namespace persimmon_fast
