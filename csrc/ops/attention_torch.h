// Long bf16 sequences on a CPU with AMX: torch's flash kernel does their matrix products on tiles.
//
// What it gives against our kernel: the op takes 0.8 of our time at 128 tokens, 0.6 at 1,024, 0.45 at 2,048; in fp32
// and fp16 ours is the faster one (1 thread, 2 cores of a Sapphire-Rapids-class Xeon, torch 2.13.0+cpu, 2026-11;
// head_dim 64). What it costs: weights rounded to bf16 and an lse to about 1e-4 (tests/test_flash_attention.py holds it
// to the contract), and two faults that are caught here: an infinite score leaves a finite output, and a NaN in v
// spreads to queries that do not see it. Both show in the lse or the output, and such a sequence is done again by our
// kernel.
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/Utils.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu.h>
#include <ATen/ops/aminmax.h>
#include <ATen/ops/logaddexp.h>

#include <cmath>
#include <tuple>

#include "csrc/cpu/attention.h"

namespace persimmon_fast {

inline bool use_torch_attention(const cpu::AttentionParams& p, const cpu::AttentionSequence& s) {
  constexpr int64_t kMinQueries = 128;  // at 64 the copies eat the gain
  static const bool has_amx = at::cpu::init_amx();
  // Below the best instruction set somebody asked for that one, by PERSIMMON_FAST_CPU_ISA or in a test.
  return has_amx && cpu::active_isa() == cpu::Isa::kAvx512Bf16 && p.dtype == DType::kBFloat16 &&
         s.num_queries >= kMinQueries && s.num_keys >= (p.causal ? s.num_queries : 1);
}

inline bool all_finite(const at::Tensor& t) {
  const auto [low, high] = at::aminmax(t);  // NaN wins
  return std::isfinite(low.item<float>()) && std::isfinite(high.item<float>());
}

// One sequence: q [num_heads, seqlen_q, head_dim], k and v [num_heads, seqlen_k, head_dim] in any strides with a dense
// last dimension. Writes out [num_heads, seqlen_q, head_dim] and, where defined, lse [num_heads, seqlen_q]. Causal with
// seqlen_q < seqlen_k: the square at the end and the older keys apart, merged by their lse in fp32. False: not finite.
inline bool torch_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, double softmax_scale,
                            bool causal, const at::Tensor& out, const at::Tensor& lse) {
  const int64_t num_older = causal ? k.size(1) - q.size(1) : 0;
  const auto attend = [&](int64_t begin, int64_t end, bool mask) {
    return at::_scaled_dot_product_flash_attention_for_cpu(q.unsqueeze(0), k.slice(1, begin, end).unsqueeze(0),
                                                           v.slice(1, begin, end).unsqueeze(0), 0.0, mask, std::nullopt,
                                                           softmax_scale);
  };
  auto [result, result_lse] = attend(num_older, k.size(1), causal);
  if (!all_finite(result) || !all_finite(result_lse)) return false;
  if (num_older > 0) {
    const auto [older, older_lse] = attend(0, num_older, false);
    if (!all_finite(older) || !all_finite(older_lse)) return false;
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
