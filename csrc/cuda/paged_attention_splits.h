// Into how many ranges the keys of a sequence are cut when there are few queries: a pure function of sizes that the
// host knows, so that no launch waits for a length on the device.
#pragma once

#include <algorithm>
#include <cstdint>

namespace persimmon_fast::cuda {

constexpr int64_t kPagedMaxQueries = 16;        // per sequence, of the split kernel: one m16 tile
constexpr int64_t kPagedBlocksPerSm = 3;        // that fit beside each other at head_dim 64 (sm_80, sm_90)
constexpr int64_t kPagedMinKeysPerSplit = 256;  // 64 KiB of keys and values at head_dim 64: shorter ones pay no combine

// capacity: keys that the page table has room for. Enough splits to fill the GPU once, none shorter than the minimum.
inline int64_t paged_attention_num_splits(int64_t batch_size, int64_t num_heads, int64_t capacity,
                                          int64_t num_multiprocessors) {
  const int64_t num_pairs = std::max<int64_t>(1, batch_size * num_heads);
  const int64_t wanted = kPagedBlocksPerSm * num_multiprocessors / num_pairs;
  return std::max<int64_t>(1, std::min(wanted, capacity / kPagedMinKeysPerSplit));
}

}  // namespace persimmon_fast::cuda
