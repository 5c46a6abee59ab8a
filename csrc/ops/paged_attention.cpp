// paged_attention on a CPU: threads.
#include "csrc/ops/paged_attention.h"

#include <torch/library.h>

#include <cstring>

#include "csrc/ops/attention_common.h"
#include "csrc/ops/attention_torch.h"

namespace persimmon_fast {
namespace {

// The keys or values of one sequence, [num_heads, num_keys, head_dim] contiguous.
at::Tensor gather_pages(const at::Tensor& cache, const cpu::AttentionSequence& s) {
  const int64_t num_heads = cache.size(1);
  const int64_t page_size = cache.size(2);
  const int64_t row_bytes = cache.size(3) * cache.element_size();
  at::Tensor gathered = at::empty({num_heads, s.num_keys, cache.size(3)}, cache.options());
  const char* from = static_cast<const char*>(cache.const_data_ptr());
  char* to = static_cast<char*>(gathered.mutable_data_ptr());
  at::parallel_for(0, num_heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head) {
      for (int64_t key = 0; key < s.num_keys; key += page_size) {
        const int64_t page = s.pages[key / page_size];
        std::memcpy(to + (head * s.num_keys + key) * row_bytes,
                    from + (page * num_heads + head) * page_size * row_bytes,
                    std::min(page_size, s.num_keys - key) * row_bytes);
      }
    }
  });
  return gathered;
}

at::Tensor paged_attention_cpu(const at::Tensor& q, const at::Tensor& k_cache, const at::Tensor& v_cache,
                               const at::Tensor& page_table, const at::Tensor& cache_seqlens,
                               const at::Tensor& cu_seqlens_q, int64_t max_seqlen_q, double softmax_scale) {
  at::Tensor out =
      paged_attention_meta(q, k_cache, v_cache, page_table, cache_seqlens, cu_seqlens_q, max_seqlen_q, softmax_scale);
  check_cu_seqlens(kPagedAttention, "cu_seqlens_q", cu_seqlens_q, q.size(0), max_seqlen_q);
  const int64_t batch_size = page_table.size(0);
  const int64_t num_pages = k_cache.size(0);
  const int64_t page_size = k_cache.size(2);
  const int64_t capacity = page_table.size(1) * page_size;
  const int32_t* starts_q = cu_seqlens_q.const_data_ptr<int32_t>();
  const int32_t* seqlens = cache_seqlens.const_data_ptr<int32_t>();
  std::vector<cpu::AttentionSequence> sequences(batch_size);
  for (int64_t b = 0; b < batch_size; ++b) {
    cpu::AttentionSequence& s = sequences[b];
    s.q_begin = starts_q[b];
    s.num_queries = starts_q[b + 1] - starts_q[b];
    s.pages = page_table.const_data_ptr<int32_t>() + b * page_table.stride(0);
    s.num_keys = seqlens[b];
    TORCH_CHECK_VALUE(s.num_keys >= s.num_queries, kPagedAttention, ": cache_seqlens[", b, "] must count the ",
                      s.num_queries, " queries of its sequence too, got ", s.num_keys);
    TORCH_CHECK_VALUE(s.num_keys <= capacity, kPagedAttention, ": cache_seqlens[", b,
                      "] must be at most max_pages * page_size = ", capacity, ", got ", s.num_keys);
    for (int64_t i = 0; i * page_size < s.num_keys; ++i) {
      TORCH_CHECK_VALUE(s.pages[i] >= 0 && s.pages[i] < num_pages, kPagedAttention, ": page_table[", b, ", ", i,
                        "] must be a page id below ", num_pages, ", got ", s.pages[i]);
    }
  }

  cpu::AttentionParams p{};
  p.q = q.const_data_ptr();
  p.q_token_stride = q.stride(0);
  p.q_head_stride = q.stride(1);
  p.k = k_cache.const_data_ptr();
  p.k_page_stride = k_cache.stride(0);
  p.k_head_stride = k_cache.stride(1);
  p.k_token_stride = k_cache.stride(2);
  p.v = v_cache.const_data_ptr();
  p.v_page_stride = v_cache.stride(0);
  p.v_head_stride = v_cache.stride(1);
  p.v_token_stride = v_cache.stride(2);
  p.page_size = page_size;
  p.out = out.mutable_data_ptr();
  p.total_q = q.size(0);
  p.num_heads = q.size(1);
  p.head_dim = q.size(2);
  p.softmax_scale = static_cast<float>(softmax_scale);
  p.causal = true;
  p.dtype = dtype_tag(q);
  std::erase_if(sequences, [&](const cpu::AttentionSequence& s) {
    if (!use_torch_attention(p, s)) return false;
    return torch_attention(q.narrow(0, s.q_begin, s.num_queries).transpose(0, 1), gather_pages(k_cache, s),
                           gather_pages(v_cache, s), softmax_scale, p.causal,
                           out.narrow(0, s.q_begin, s.num_queries).transpose(0, 1), at::Tensor());
  });
  run_attention(p, sequences);
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(persimmon_fast, Meta, m) { m.impl("paged_attention", paged_attention_meta); }
TORCH_LIBRARY_IMPL(persimmon_fast, CPU, m) { m.impl("paged_attention", paged_attention_cpu); }

}  // namespace persimmon_fast
