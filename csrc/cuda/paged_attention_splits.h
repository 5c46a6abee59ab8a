// Into how many ranges the keys of a sequence are cut when there are few queries. The host, which does not know the
// lengths, launches as many as the longest sequence that the page table has room for may need; each block finds on the
// device how many its sequence is cut into. So one launch, captured once, is right for every length.
#pragma once

#include <algorithm>
#include <cstdint>

namespace persimmon_fast::cuda {

constexpr int64_t kPagedMaxQueries = 16;        // per sequence, of the split kernel: one m16 tile
constexpr int64_t kPagedBlocksPerSm = 3;        // that fit beside each other at head_dim 64 (sm_80, sm_90)
constexpr int64_t kPagedMinKeysPerSplit = 128;  // what a block loads at once: shorter splits save no time

// Of a sequence of num_keys, where max_splits were launched.
template <typename T>
constexpr T paged_attention_splits_of(T num_keys, T max_splits) {
  const T most = num_keys / static_cast<T>(kPagedMinKeysPerSplit);
  return most < 1 ? 1 : most < max_splits ? most : max_splits;
}

// To launch. capacity: keys that the page table has room for. Enough to fill the GPU once.
inline int64_t paged_attention_num_splits(int64_t batch_size, int64_t num_heads, int64_t capacity,
                                          int64_t num_multiprocessors) {
  const int64_t num_pairs = std::max<int64_t>(1, batch_size * num_heads);
  const int64_t wanted = kPagedBlocksPerSm * num_multiprocessors / num_pairs;
  return paged_attention_splits_of(capacity, std::max<int64_t>(1, wanted));
}

}  // namespace persimmon_fast::cuda
