// What flash_attention and paged_attention share on CUDA: parameters, and the limits of a launch.
#pragma once

#include "csrc/cuda/attention_params.h"
#include "csrc/ops/attention_checks.h"
#include "csrc/ops/cuda/device.h"

namespace persimmon_fast {

// Everything but the keys.
inline cuda::AttentionParams cuda_attention_params(const char* op, const at::Tensor& q, const at::Tensor& cu_seqlens_q,
                                                   int64_t max_seqlen_q, double softmax_scale, bool causal,
                                                   const at::Tensor& out) {
  check_head_dim_cuda(op, q.size(2));
  TORCH_CHECK_VALUE(q.size(1) <= INT32_MAX, op, ": q has too many heads: ", q.size(1));
  TORCH_CHECK_VALUE(max_seqlen_q >= 0, op, ": max_seqlen_q must not be negative, got ", max_seqlen_q);
  cuda::AttentionParams p{};
  p.q = q.const_data_ptr();
  p.q_token_stride = q.stride(0);
  p.q_head_stride = q.stride(1);
  p.out = out.mutable_data_ptr();
  p.cu_seqlens_q = cu_seqlens_q.const_data_ptr<int32_t>();
  p.batch_size = static_cast<int32_t>(cu_seqlens_q.size(0) - 1);
  p.num_heads = static_cast<int32_t>(q.size(1));
  p.head_dim = static_cast<int32_t>(q.size(2));
  p.total_q = q.size(0);
  p.max_seqlen_q = std::min(max_seqlen_q, q.size(0));
  p.softmax_scale = static_cast<float>(softmax_scale);
  p.causal = causal;
  p.num_multiprocessors = num_multiprocessors();
  p.dtype = dtype_tag(q);
  return p;
}

inline void check_num_blocks(const char* op, const cuda::AttentionParams& p, int64_t num_blocks) {
  TORCH_CHECK_VALUE(num_blocks <= INT32_MAX, op, ": batch_size ", p.batch_size, " x num_heads ", p.num_heads,
                    " with max_seqlen_q ", p.max_seqlen_q, " needs ", num_blocks,
                    " blocks, a launch takes fewer than 2^31: call it for parts of the batch");
}

}  // namespace persimmon_fast
