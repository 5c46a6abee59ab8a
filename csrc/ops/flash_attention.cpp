// flash_attention on a CPU: threads.
#include "csrc/ops/flash_attention.h"

#include <torch/library.h>

#include "csrc/ops/attention_common.h"
#include "csrc/ops/attention_torch.h"

namespace persimmon_fast {
namespace {

std::tuple<at::Tensor, at::Tensor> flash_attention_cpu(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                                       const at::Tensor& cu_seqlens_q, const at::Tensor& cu_seqlens_k,
                                                       const OptionalTensor& seqused_k, int64_t max_seqlen_q,
                                                       int64_t max_seqlen_k, double softmax_scale, bool causal) {
  auto [out, lse] = flash_attention_meta(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, max_seqlen_q, max_seqlen_k,
                                         softmax_scale, causal);
  check_cu_seqlens(kFlashAttention, "cu_seqlens_q", cu_seqlens_q, q.size(0), max_seqlen_q);
  check_cu_seqlens(kFlashAttention, "cu_seqlens_k", cu_seqlens_k, k.size(0), max_seqlen_k);
  const int64_t batch_size = cu_seqlens_q.size(0) - 1;
  const int32_t* starts_q = cu_seqlens_q.const_data_ptr<int32_t>();
  const int32_t* starts_k = cu_seqlens_k.const_data_ptr<int32_t>();
  const int32_t* used_k = seqused_k.has_value() ? seqused_k->const_data_ptr<int32_t>() : nullptr;
  std::vector<cpu::AttentionSequence> sequences(batch_size);
  for (int64_t b = 0; b < batch_size; ++b) {
    const int64_t seqlen_k = starts_k[b + 1] - starts_k[b];
    TORCH_CHECK_VALUE(used_k == nullptr || (used_k[b] >= 0 && used_k[b] <= seqlen_k), kFlashAttention, ": seqused_k[",
                      b, "] must be between 0 and the ", seqlen_k, " keys of its sequence, got ", used_k[b]);
    sequences[b].q_begin = starts_q[b];
    sequences[b].num_queries = starts_q[b + 1] - starts_q[b];
    sequences[b].k_begin = starts_k[b];
    sequences[b].num_keys = used_k != nullptr ? used_k[b] : seqlen_k;
  }

  cpu::AttentionParams p{};
  p.q = q.const_data_ptr();
  p.q_token_stride = q.stride(0);
  p.q_head_stride = q.stride(1);
  p.k = k.const_data_ptr();
  p.k_token_stride = k.stride(0);
  p.k_head_stride = k.stride(1);
  p.v = v.const_data_ptr();
  p.v_token_stride = v.stride(0);
  p.v_head_stride = v.stride(1);
  p.out = out.mutable_data_ptr();
  p.lse = lse.mutable_data_ptr<float>();
  p.total_q = q.size(0);
  p.num_heads = q.size(1);
  p.head_dim = q.size(2);
  p.softmax_scale = static_cast<float>(softmax_scale);
  p.causal = causal;
  p.dtype = dtype_tag(q);
  std::erase_if(sequences, [&](const cpu::AttentionSequence& s) {
    if (!use_torch_attention(p, s)) return false;
    const auto heads_first = [](const at::Tensor& t, int64_t begin, int64_t length) {
      return t.narrow(0, begin, length).transpose(0, 1);
    };
    return torch_attention(heads_first(q, s.q_begin, s.num_queries), heads_first(k, s.k_begin, s.num_keys),
                           heads_first(v, s.k_begin, s.num_keys), softmax_scale, causal,
                           heads_first(out, s.q_begin, s.num_queries), lse.narrow(1, s.q_begin, s.num_queries));
  });
  run_attention(p, sequences);
  return {out, lse};
}

}  // namespace

TORCH_LIBRARY_IMPL(persimmon_fast, Meta, m) { m.impl("flash_attention", flash_attention_meta); }
TORCH_LIBRARY_IMPL(persimmon_fast, CPU, m) { m.impl("flash_attention", flash_attention_cpu); }

}  // namespace persimmon_fast
