// What flash_attention and paged_attention share on a CPU: checks of lengths, the list of sequences, threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <vector>

#include "csrc/common/ceil_div.h"
#include "csrc/cpu/attention.h"
#include "csrc/ops/attention_checks.h"

namespace persimmon_fast {

// Starts at 0, ascends, ends at `total`, no step above max_seqlen. Garbage must not become an address.
inline void check_cu_seqlens(const char* op, const char* name, const at::Tensor& cu_seqlens, int64_t total,
                             int64_t max_seqlen) {
  const int32_t* starts = cu_seqlens.const_data_ptr<int32_t>();
  const int64_t batch_size = cu_seqlens.size(0) - 1;
  TORCH_CHECK_VALUE(starts[0] == 0, op, ": ", name, " must start at 0, got ", starts[0]);
  for (int64_t b = 0; b < batch_size; ++b) {
    TORCH_CHECK_VALUE(starts[b] <= starts[b + 1], op, ": ", name, " must ascend, got ", starts[b], " then ",
                      starts[b + 1], " at ", b + 1);
    TORCH_CHECK_VALUE(starts[b + 1] - starts[b] <= max_seqlen, op, ": ", name, " holds a sequence of ",
                      starts[b + 1] - starts[b], " tokens at ", b, ", more than its max_seqlen ", max_seqlen);
  }
  TORCH_CHECK_VALUE(starts[batch_size] == total, op, ": ", name, " must end at the number of tokens ", total, ", got ",
                    starts[batch_size]);
}

// About the time of one work item, in keys times queries.
inline int64_t item_cost(const cpu::AttentionParams& p, const cpu::AttentionSequence& s, int64_t item) {
  const int64_t first_query = item % s.num_blocks * cpu::kAttentionQueryBlock;
  const int64_t last_query = std::min(first_query + cpu::kAttentionQueryBlock, s.num_queries);
  const int64_t seen = p.causal ? std::max<int64_t>(0, s.num_keys - s.num_queries + last_query) : s.num_keys;
  const int64_t begin = s.num_splits > 1 ? item / s.num_blocks / p.num_heads * cpu::kAttentionSplitKeys : 0;
  const int64_t end = s.num_splits > 1 ? std::min(begin + cpu::kAttentionSplitKeys, seen) : seen;
  constexpr int64_t kFixedCost = 64;
  return (std::max<int64_t>(0, end - begin) + kFixedCost) * (last_query - first_query);
}

// Numbers the work items and partial results of `sequences` and runs the kernel; p.sequences and p.partials are set
// here.
inline void run_attention(cpu::AttentionParams p, std::vector<cpu::AttentionSequence>& sequences) {
  int64_t num_items = 0;
  int64_t num_partials = 0;
  std::vector<int64_t> cost_before{0};  // [num_items + 1]
  for (cpu::AttentionSequence& s : sequences) {
    const bool may_split = s.num_queries <= cpu::kAttentionMaxSplitQueries;
    s.num_blocks = ceil_div(s.num_queries, cpu::kAttentionQueryBlock);
    s.num_splits = may_split ? std::max<int64_t>(1, ceil_div(s.num_keys, cpu::kAttentionSplitKeys)) : 1;
    s.first_item = num_items;
    s.first_partial = num_partials;
    num_items += p.num_heads * s.num_blocks * s.num_splits;
    if (s.num_splits > 1) num_partials += p.num_heads * s.num_queries * s.num_splits;
    for (int64_t item = 0; item < num_items - s.first_item; ++item) {
      cost_before.push_back(cost_before.back() + item_cost(p, s, item));
    }
  }
  if (num_items == 0) return;
  at::Tensor partials;
  if (num_partials > 0) partials = at::empty({num_partials, p.head_dim + 2}, at::kFloat);
  p.sequences = sequences.data();
  p.num_sequences = static_cast<int64_t>(sequences.size());
  p.partials = num_partials > 0 ? partials.mutable_data_ptr<float>() : nullptr;
  // Tasks take about as long, not as many items: the last split of a sequence may hold one key. A task has enough keys
  // (about 64K elements of k and v) to pay for waking a thread.
  const int64_t total_cost = cost_before.back();
  const int64_t num_tasks =
      std::clamp<int64_t>(2 * total_cost * p.head_dim / 65536, 1, std::min<int64_t>(at::get_num_threads(), num_items));
  const auto first_item = [&](int64_t task) {  // num_items of the task behind the last: every item costs something
    return std::lower_bound(cost_before.begin(), cost_before.end(), total_cost * task / num_tasks) -
           cost_before.begin();
  };
  at::parallel_for(0, num_tasks, 1,
                   [&](int64_t begin, int64_t end) { cpu::attention(p, first_item(begin), first_item(end)); });
  if (num_partials > 0) {
    const int64_t num_rows = p.num_sequences * p.num_heads;
    const int64_t row_grain = std::max<int64_t>(1, 65536 * num_rows / (num_partials * p.head_dim));
    at::parallel_for(0, num_rows, row_grain,
                     [&](int64_t begin, int64_t end) { cpu::attention_combine(p, begin, end); });
  }
}

}  // namespace persimmon_fast
