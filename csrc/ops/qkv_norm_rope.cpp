// qkv_norm_rope, qkv_norm_rope_paged on a CPU: threads, and torch's product for many rows.
#include "csrc/ops/qkv_norm_rope.h"

#include <ATen/Parallel.h>
#include <ATen/ops/linear.h>
#include <torch/library.h>

#include "csrc/cpu/qkv_norm_rope.h"
#include "csrc/ops/stream.h"

namespace persimmon_fast {
namespace {

// Reads values: for CPU tensors.
void check_slots_cpu(const char* op, const Paged& paged) {
  const int64_t num_slots = paged.k_cache.size(0) * paged.k_cache.size(2);
  const int64_t* slots = paged.slot_mapping.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < paged.slot_mapping.size(0); ++i) {
    TORCH_CHECK_VALUE(slots[i] < num_slots, op, ": slot_mapping[", i, "] = ", slots[i],
                      " is outside the cache: num_pages * page_size = ", num_slots);
  }
}

// Writes q, k and v to `out`.
void run_cpu(const QkvOutputs& out, const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
             const NormRopeArgs& a, int64_t num_heads) {
  const int64_t num_tokens = x.size(0);
  const int64_t head_dim = weight.size(0) / (3 * num_heads);
  if (num_tokens == 0) return;
  cpu::QkvNormRopeParams p{};
  p.out = out;
  p.head = norm_rope_params(a, num_heads, head_dim, dtype_tag(x));
  if (num_tokens > cpu::kMaxStreamRows) {
    const at::Tensor projection = at::linear(x, weight, bias).contiguous();
    p.projection = projection.const_data_ptr();
    at::parallel_for(0, num_tokens * num_heads, head_grain(3 * head_dim),
                     [&](int64_t begin, int64_t end) { cpu::qkv_epilogue(p, begin, end); });
    return;
  }
  const at::Tensor packed = pack_activations(x);
  const at::Tensor sums = fp32_scratch(num_tokens * weight.size(0));
  p.product = stream_params(packed, num_tokens, weight, sums);
  p.bias = data_or_null(bias);
  const int64_t grain = (cpu::stream_grain(x.size(1)) + 3 * head_dim - 1) / (3 * head_dim);
  at::parallel_for(0, num_heads, grain, [&](int64_t begin, int64_t end) { cpu::qkv_norm_rope(p, begin, end); });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> qkv_norm_rope_cpu(
    const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias, const OptionalTensor& q_weight,
    const OptionalTensor& q_bias, const OptionalTensor& k_weight, const OptionalTensor& k_bias,
    const at::Tensor& cos_sin, const at::Tensor& position_ids, double eps, int64_t num_heads,
    const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, double norm_eps) {
  auto [q, k, v] = qkv_norm_rope_meta(x, weight, bias, q_weight, q_bias, k_weight, k_bias, cos_sin, position_ids, eps,
                                      num_heads, norm_weight, norm_bias, norm_eps);
  const NormRopeArgs a{q_weight, q_bias, k_weight, k_bias, cos_sin, position_ids, eps};
  check_positions_cpu("qkv_norm_rope", a);
  run_cpu(qkv_outputs(q, k, v), normalised_cpu(x, {norm_weight, norm_bias, norm_eps}), weight, bias, a, num_heads);
  return {q, k, v};
}

at::Tensor qkv_norm_rope_paged_cpu(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                                   const OptionalTensor& q_weight, const OptionalTensor& q_bias,
                                   const OptionalTensor& k_weight, const OptionalTensor& k_bias,
                                   const at::Tensor& cos_sin, const at::Tensor& position_ids, double eps,
                                   int64_t num_heads, const at::Tensor& slot_mapping, const at::Tensor& k_cache,
                                   const at::Tensor& v_cache, const OptionalTensor& norm_weight,
                                   const OptionalTensor& norm_bias, double norm_eps) {
  at::Tensor q =
      qkv_norm_rope_paged_meta(x, weight, bias, q_weight, q_bias, k_weight, k_bias, cos_sin, position_ids, eps,
                               num_heads, slot_mapping, k_cache, v_cache, norm_weight, norm_bias, norm_eps);
  const NormRopeArgs a{q_weight, q_bias, k_weight, k_bias, cos_sin, position_ids, eps};
  check_positions_cpu("qkv_norm_rope_paged", a);
  const Paged paged{slot_mapping, k_cache, v_cache};
  check_slots_cpu("qkv_norm_rope_paged", paged);
  run_cpu(qkv_outputs(q, paged), normalised_cpu(x, {norm_weight, norm_bias, norm_eps}), weight, bias, a, num_heads);
  return q;
}

}  // namespace

TORCH_LIBRARY_IMPL(persimmon_fast, Meta, m) {
  m.impl("qkv_norm_rope", qkv_norm_rope_meta);
  m.impl("qkv_norm_rope_paged", qkv_norm_rope_paged_meta);
}

TORCH_LIBRARY_IMPL(persimmon_fast, CPU, m) {
  m.impl("qkv_norm_rope", qkv_norm_rope_cpu);
  m.impl("qkv_norm_rope_paged", qkv_norm_rope_paged_cpu);
}

}  // namespace persimmon_fast
