// qkv_norm_rope, qkv_norm_rope_paged: checks, allocation, threads, and torch's product for many rows.
#include "csrc/cpu/qkv_norm_rope.h"

#include <ATen/ops/linear.h>
#include <torch/library.h>

#include <tuple>

#include "csrc/ops/checks.h"
#include "csrc/ops/norm_rope.h"
#include "csrc/ops/stream.h"

namespace persimmon_fast {
namespace {

struct Paged {
  const at::Tensor& slot_mapping;
  const at::Tensor& k_cache;
  const at::Tensor& v_cache;
};

// Returns head_dim.
c10::SymInt check_qkv_norm_rope(const char* op, const at::Tensor& x, const at::Tensor& weight,
                                const OptionalTensor& bias, const NormRopeArgs& a, int64_t num_heads) {
  check_float(op, "x", x);
  check_shape(op, "x", x, {-1, -1}, "[num_tokens, hidden_size]");
  TORCH_CHECK_VALUE(x.sym_size(1) > 0, op, ": x must have hidden_size > 0, got ", x.sym_sizes());
  check_dense_rows(op, "x", x);
  TORCH_CHECK_VALUE(num_heads > 0, op, ": num_heads must be positive, got ", num_heads);
  check_same(op, "weight", weight, "x", x);
  check_shape(op, "weight", weight, {-1, x.sym_size(1)}, "[num_heads * 3 * head_dim, hidden_size]");
  const c10::SymInt rows = weight.sym_size(0);
  TORCH_CHECK_VALUE(rows % (3 * num_heads) == 0, op, ": weight must be [num_heads * 3 * head_dim, hidden_size] with ",
                    "num_heads=", num_heads, ", got ", weight.sym_sizes());
  check_dense_rows(op, "weight", weight);
  if (bias.has_value()) {
    check_same(op, "bias", *bias, "x", x);
    check_shape(op, "bias", *bias, {rows}, "[num_heads * 3 * head_dim]");
    check_dense_rows(op, "bias", *bias);
  }
  const c10::SymInt head_dim = rows / (3 * num_heads);
  check_norm_rope(op, a, "x", x, x.sym_size(0), num_heads, head_dim);
  return head_dim;
}

void check_paged(const char* op, const at::Tensor& x, const c10::SymInt& num_heads, const c10::SymInt& head_dim,
                 const Paged& paged) {
  check_device(op, "slot_mapping", paged.slot_mapping, "x", x);
  check_dtype(op, "slot_mapping", paged.slot_mapping, at::kLong);
  check_shape(op, "slot_mapping", paged.slot_mapping, {x.sym_size(0)}, "[num_tokens]");
  check_dense_rows(op, "slot_mapping", paged.slot_mapping);
  const char* layout = "[num_pages, num_heads, page_size, head_dim]";
  check_same(op, "k_cache", paged.k_cache, "x", x);
  check_shape(op, "k_cache", paged.k_cache, {-1, num_heads, -1, head_dim}, layout);
  check_same(op, "v_cache", paged.v_cache, "x", x);
  check_shape(op, "v_cache", paged.v_cache, {paged.k_cache.sym_size(0), num_heads, paged.k_cache.sym_size(2), head_dim},
              layout);
  TORCH_CHECK_VALUE(paged.k_cache.is_contiguous(), op, ": k_cache must be contiguous, got strides ",
                    paged.k_cache.sym_strides());
  TORCH_CHECK_VALUE(paged.v_cache.is_contiguous(), op, ": v_cache must be contiguous, got strides ",
                    paged.v_cache.sym_strides());
}

// Reads values: for CPU tensors.
void check_slots_cpu(const char* op, const Paged& paged) {
  const int64_t num_slots = paged.k_cache.size(0) * paged.k_cache.size(2);
  const int64_t* slots = paged.slot_mapping.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < paged.slot_mapping.size(0); ++i) {
    TORCH_CHECK_VALUE(slots[i] < num_slots, op, ": slot_mapping[", i, "] = ", slots[i],
                      " is outside the cache: num_pages * page_size = ", num_slots);
  }
}

at::Tensor empty_heads(const at::Tensor& x, const c10::SymInt& num_heads, const c10::SymInt& head_dim) {
  return at::empty_symint({x.sym_size(0), num_heads, head_dim}, x.options());
}

// Writes q, and k and v where the outputs of p say. p.q, p.k, p.v, p.slot_mapping and p.page_size are set.
void run_cpu(cpu::QkvNormRopeParams& p, const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
             const NormRopeArgs& a, int64_t num_heads) {
  const int64_t num_tokens = x.size(0);
  const int64_t head_dim = weight.size(0) / (3 * num_heads);
  if (num_tokens == 0) return;
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

std::tuple<at::Tensor, at::Tensor, at::Tensor> qkv_norm_rope_meta(
    const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias, const OptionalTensor& q_weight,
    const OptionalTensor& q_bias, const OptionalTensor& k_weight, const OptionalTensor& k_bias,
    const at::Tensor& cos_sin, const at::Tensor& position_ids, double eps, int64_t num_heads) {
  const NormRopeArgs a{q_weight, q_bias, k_weight, k_bias, cos_sin, position_ids, eps};
  const c10::SymInt head_dim = check_qkv_norm_rope("qkv_norm_rope", x, weight, bias, a, num_heads);
  return {empty_heads(x, num_heads, head_dim), empty_heads(x, num_heads, head_dim),
          empty_heads(x, num_heads, head_dim)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> qkv_norm_rope_cpu(
    const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias, const OptionalTensor& q_weight,
    const OptionalTensor& q_bias, const OptionalTensor& k_weight, const OptionalTensor& k_bias,
    const at::Tensor& cos_sin, const at::Tensor& position_ids, double eps, int64_t num_heads) {
  auto [q, k, v] =
      qkv_norm_rope_meta(x, weight, bias, q_weight, q_bias, k_weight, k_bias, cos_sin, position_ids, eps, num_heads);
  const NormRopeArgs a{q_weight, q_bias, k_weight, k_bias, cos_sin, position_ids, eps};
  check_positions_cpu("qkv_norm_rope", a);
  cpu::QkvNormRopeParams p{};
  p.q = q.mutable_data_ptr();
  p.k = k.mutable_data_ptr();
  p.v = v.mutable_data_ptr();
  p.page_size = 1;
  run_cpu(p, x, weight, bias, a, num_heads);
  return {q, k, v};
}

at::Tensor qkv_norm_rope_paged_meta(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                                    const OptionalTensor& q_weight, const OptionalTensor& q_bias,
                                    const OptionalTensor& k_weight, const OptionalTensor& k_bias,
                                    const at::Tensor& cos_sin, const at::Tensor& position_ids, double eps,
                                    int64_t num_heads, const at::Tensor& slot_mapping, const at::Tensor& k_cache,
                                    const at::Tensor& v_cache) {
  const char* op = "qkv_norm_rope_paged";
  const NormRopeArgs a{q_weight, q_bias, k_weight, k_bias, cos_sin, position_ids, eps};
  const c10::SymInt head_dim = check_qkv_norm_rope(op, x, weight, bias, a, num_heads);
  check_paged(op, x, num_heads, head_dim, {slot_mapping, k_cache, v_cache});
  return empty_heads(x, num_heads, head_dim);
}

at::Tensor qkv_norm_rope_paged_cpu(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                                   const OptionalTensor& q_weight, const OptionalTensor& q_bias,
                                   const OptionalTensor& k_weight, const OptionalTensor& k_bias,
                                   const at::Tensor& cos_sin, const at::Tensor& position_ids, double eps,
                                   int64_t num_heads, const at::Tensor& slot_mapping, const at::Tensor& k_cache,
                                   const at::Tensor& v_cache) {
  at::Tensor q = qkv_norm_rope_paged_meta(x, weight, bias, q_weight, q_bias, k_weight, k_bias, cos_sin, position_ids,
                                          eps, num_heads, slot_mapping, k_cache, v_cache);
  const NormRopeArgs a{q_weight, q_bias, k_weight, k_bias, cos_sin, position_ids, eps};
  check_positions_cpu("qkv_norm_rope_paged", a);
  check_slots_cpu("qkv_norm_rope_paged", {slot_mapping, k_cache, v_cache});
  cpu::QkvNormRopeParams p{};
  p.q = q.mutable_data_ptr();
  p.k = k_cache.mutable_data_ptr();
  p.v = v_cache.mutable_data_ptr();
  p.slot_mapping = slot_mapping.const_data_ptr<int64_t>();
  p.page_size = k_cache.size(2);
  run_cpu(p, x, weight, bias, a, num_heads);
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
