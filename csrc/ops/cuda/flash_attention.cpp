// flash_attention on CUDA: launches.
#include "csrc/ops/flash_attention.h"

#include "csrc/cuda/flash_attention.h"
#include "csrc/ops/cuda/attention.h"
#include "csrc/ops/cuda/device.h"

namespace persimmon_fast {
namespace {

std::tuple<at::Tensor, at::Tensor> flash_attention_cuda(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                                        const at::Tensor& cu_seqlens_q, const at::Tensor& cu_seqlens_k,
                                                        const OptionalTensor& seqused_k, int64_t max_seqlen_q,
                                                        int64_t max_seqlen_k, double softmax_scale, bool causal) {
  const DeviceGuard guard(q.device());
  auto [out, lse] = flash_attention_meta(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, max_seqlen_q, max_seqlen_k,
                                         softmax_scale, causal);
  cuda::AttentionParams p =
      cuda_attention_params(kFlashAttention, q, cu_seqlens_q, max_seqlen_q, softmax_scale, causal, out);
  p.k = k.const_data_ptr();
  p.k_token_stride = k.stride(0);
  p.k_head_stride = k.stride(1);
  p.v = v.const_data_ptr();
  p.v_token_stride = v.stride(0);
  p.v_head_stride = v.stride(1);
  p.total_k = k.size(0);
  p.lse = lse.mutable_data_ptr<float>();
  p.cu_seqlens_k = cu_seqlens_k.const_data_ptr<int32_t>();
  p.seqlens_k = static_cast<const int32_t*>(data_or_null(seqused_k));
  check_num_blocks(kFlashAttention, p, cuda::flash_attention_num_blocks(p));
  check_launch(kFlashAttention, cuda::launch_flash_attention(p, current_stream()));
  return {out, lse};
}

}  // namespace

PF_CUDA_LIBRARY_IMPL(m) { m.impl("flash_attention", flash_attention_cuda); }

}  // namespace persimmon_fast
