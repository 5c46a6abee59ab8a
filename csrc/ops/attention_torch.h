// Long bf16 sequences on a CPU with AMX: torch's flash kernel does their matrix products on tiles.
//
// What it gives: the op takes 0.8 of our own kernel's time at 128 tokens, 0.6 at 1,024, 0.45 at 2,048 (head_dim 64); in
// fp32 and fp16 ours is the faster one. What it costs: weights rounded to bf16 and an lse to about 1e-4, within the
// contract of tests/helpers.py. Three faults are caught here, and our own kernel does such a sequence again: an
// infinite score leaves a finite output, a NaN in v spreads to queries that do not see it, and a row of scores that are
// all -inf has an lse of 0. Measured with 1 thread, CPU time, Sapphire-Rapids-class Xeon, torch 2.13.0+cpu, 2026-11
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu.h>
#include <ATen/ops/aminmax.h>
#include <ATen/ops/logaddexp.h>

#include <cmath>
#include <tuple>

#include "csrc/cpu/attention.h"

namespace persimmon_fast {

inline bool use_torch_attention(const cpu::AttentionParams& p, const cpu::AttentionSequence& s) {
  constexpr int64_t kMinQueries = 128;  // at 64 the copies eat the gain
  return cpu::active_isa() == cpu::Isa::kAmx && p.dtype == DType::kBFloat16 && s.num_queries >= kMinQueries &&
         s.num_keys >= (p.causal ? s.num_queries : 1);
}

inline bool is_sound(const at::Tensor& out, const at::Tensor& lse) {
  const auto all_finite = [](const at::Tensor& t) {
    const auto [low, high] = at::aminmax(t);  // NaN wins
    return std::isfinite(low.item<float>()) && std::isfinite(high.item<float>());
  };
  return all_finite(out) && all_finite(lse) && !lse.eq(0).any().item<bool>();
}

// One sequence: q [num_heads, seqlen_q, head_dim], k and v [num_heads, seqlen_k, head_dim] in any strides with a dense
// last dimension. Writes out [num_heads, seqlen_q, head_dim] and, where defined, lse [num_heads, seqlen_q]. Causal with
// seqlen_q < seqlen_k: the square at the end and the older keys apart, merged by their lse in fp32. False: not sound.
inline bool torch_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, double softmax_scale,
                            bool causal, const at::Tensor& out, const at::Tensor& lse) {
  const int64_t num_older = causal ? k.size(1) - q.size(1) : 0;
  const auto attend = [&](int64_t begin, int64_t end, bool mask) {
    return at::_scaled_dot_product_flash_attention_for_cpu(q.unsqueeze(0), k.slice(1, begin, end).unsqueeze(0),
                                                           v.slice(1, begin, end).unsqueeze(0), 0.0, mask, std::nullopt,
                                                           softmax_scale);
  };
  auto [result, result_lse] = attend(num_older, k.size(1), causal);
  if (!is_sound(result, result_lse)) return false;
  if (num_older > 0) {
    const auto [older, older_lse] = attend(0, num_older, false);
    if (!is_sound(older, older_lse)) return false;
    const at::Tensor merged_lse = at::logaddexp(result_lse, older_lse);
    result =
        result * (result_lse - merged_lse).exp_().unsqueeze(-1) + older * (older_lse - merged_lse).exp_().unsqueeze(-1);
    result_lse = merged_lse;
  }
  out.copy_(result.squeeze(0));
  if (lse.defined()) lse.copy_(result_lse.squeeze(0));
  return true;
}

}  // namespace persimmon_fast
