// paged_attention on CUDA: scratch memory, launches.
#include "csrc/ops/paged_attention.h"

#include "csrc/cuda/flash_attention.h"
#include "csrc/cuda/paged_attention.h"
#include "csrc/ops/cuda/attention.h"
#include "csrc/ops/cuda/device.h"

namespace persimmon_fast {
namespace {

at::Tensor paged_attention_cuda(const at::Tensor& q, const at::Tensor& k_cache, const at::Tensor& v_cache,
                                const at::Tensor& page_table, const at::Tensor& cache_seqlens,
                                const at::Tensor& cu_seqlens_q, int64_t max_seqlen_q, double softmax_scale) {
  const DeviceGuard guard(q.device());
  at::Tensor out =
      paged_attention_meta(q, k_cache, v_cache, page_table, cache_seqlens, cu_seqlens_q, max_seqlen_q, softmax_scale);
  cuda::AttentionParams p =
      cuda_attention_params(kPagedAttention, q, cu_seqlens_q, max_seqlen_q, softmax_scale, true, out);
  const int64_t page_size = k_cache.size(2);
  TORCH_CHECK_VALUE(page_table.size(1) <= INT32_MAX / page_size, kPagedAttention, ": page_table has room for ",
                    page_table.size(1), " pages of ", page_size, " keys, the kernels count fewer than 2^31 keys");
  p.k = k_cache.const_data_ptr();
  p.k_token_stride = k_cache.stride(2);
  p.k_head_stride = k_cache.stride(1);
  p.v = v_cache.const_data_ptr();
  p.v_token_stride = v_cache.stride(2);
  p.v_head_stride = v_cache.stride(1);
  p.seqlens_k = cache_seqlens.const_data_ptr<int32_t>();
  p.page_table = page_table.const_data_ptr<int32_t>();
  p.page_table_stride = page_table.stride(0);
  p.page_stride = k_cache.stride(0);
  p.total_k = k_cache.size(0);
  p.page_size = static_cast<int32_t>(page_size);
  if (p.dtype == DType::kFloat32 || p.max_seqlen_q > cuda::kPagedMaxQueries) {
    check_num_blocks(kPagedAttention, p, cuda::flash_attention_num_blocks(p));
    check_launch(kPagedAttention, cuda::launch_flash_attention(p, current_stream()));
    return out;
  }
  const int64_t capacity = page_table.size(1) * page_size;
  p.num_splits = static_cast<int32_t>(
      cuda::paged_attention_num_splits(p.batch_size, p.num_heads, capacity, num_multiprocessors()));
  check_num_blocks(kPagedAttention, p, cuda::paged_attention_num_blocks(p));
  at::Tensor partials;
  if (p.num_splits > 1) {
    const int64_t num_partials = p.batch_size * p.max_seqlen_q * p.num_heads * p.num_splits;
    partials = at::empty({num_partials * (p.head_dim + 2)}, q.options().dtype(at::kFloat));
    p.partial_out = partials.mutable_data_ptr<float>();
    p.partial_stat = p.partial_out + num_partials * p.head_dim;
  }
  check_launch(kPagedAttention, cuda::launch_paged_attention(p, current_stream()));
  return out;
}

}  // namespace

PF_CUDA_LIBRARY_IMPL(m) { m.impl("paged_attention", paged_attention_cuda); }

}  // namespace persimmon_fast
