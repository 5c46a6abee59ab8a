// What the two ways through a block of attention share: scratch memory, tiles of keys, prefetch, the online softmax.
// For attention.cpp, where the access pattern is described.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "csrc/cpu/attention.h"
#include "csrc/cpu/vec.h"

namespace persimmon_fast::cpu::PF_ISA {
constexpr int kW = Vec::kWidth;
constexpr int kTileKeys = 64;
constexpr int kMaxDim = static_cast<int>(kAttentionMaxHeadDim);
constexpr int kMaxRows = static_cast<int>(kAttentionQueryBlock);
constexpr int kAhead = 4;  // tiles that are prefetched
constexpr float kMinusInf = -std::numeric_limits<float>::infinity();
// Everything of one work item; about 150 KB, so on the stack of the thread and in its L2.
struct AttentionScratch {
  alignas(64) float q[kMaxRows * kMaxDim];              // [row][head_dim padded], times softmax_scale
  alignas(64) float acc[kMaxRows * kMaxDim];            // [row][head_dim padded], sum of weight * v
  alignas(64) float weights[kMaxRows * kTileKeys];      // [row][key], scores, then exp(score - max)
  alignas(64) float k_transposed[kMaxDim * kTileKeys];  // [dim][key]
  alignas(64) float v_wide[kTileKeys * kMaxDim];        // [key][head_dim padded]
  float max[kMaxRows];
  float sum[kMaxRows];
};

// Keys or dims in whole registers.
constexpr int padded(int n) { return (n + kW - 1) / kW * kW; }
inline int padded_dim(const AttentionParams& p) { return padded(static_cast<int>(p.head_dim)); }

template <typename T>
struct KeyTile {
  const T* k;
  const T* v;
  int count;
  int prefetched;  // keys
};

template <typename T>
inline KeyTile<T> key_tile(const AttentionParams& p, const AttentionSequence& s, int64_t head, int64_t key,
                           int64_t end) {
  int64_t page = 0;
  int64_t row = s.k_begin + key;
  int64_t count = std::min<int64_t>(kTileKeys, end - key);
  if (s.pages != nullptr) {
    page = s.pages[key / p.page_size];
    row = key % p.page_size;
    count = std::min(count, p.page_size - row);
  }
  return {static_cast<const T*>(p.k) + page * p.k_page_stride + head * p.k_head_stride + row * p.k_token_stride,
          static_cast<const T*>(p.v) + page * p.v_page_stride + head * p.v_head_stride + row * p.v_token_stride,
          static_cast<int>(count), 0};
}

// One step of the prefetch: num_keys keys of each tile ahead. A tile should take kTileKeys / kAhead keys in as many
// small steps as its computation has parts: memory idles in every stretch of about 300 cycles without one.
template <typename T>
inline void prefetch_keys(const AttentionParams& p, KeyTile<T> (&ahead)[kAhead], int num_keys) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (KeyTile<T>& tile : ahead) {
    const int stop = std::min(tile.prefetched + num_keys, tile.count);
    for (; tile.prefetched < stop; ++tile.prefetched) {
      for (int64_t d = 0; d < p.head_dim; d += kLine) {
        __builtin_prefetch(tile.k + tile.prefetched * p.k_token_stride + d);
        __builtin_prefetch(tile.v + tile.prefetched * p.v_token_stride + d);
      }
    }
  }
}

// scores[j] -> exp(scores[j] - max) for j < visible, 0 up to padded; updates max, sum and acc (the online softmax).
inline void softmax_row(float* scores, int visible, int padded, float& max, float& sum, float* acc, int head_dim) {
  for (int j = visible; j < padded; ++j) scores[j] = kMinusInf;
  Vec tile_max = Vec::set1(kMinusInf);
  for (int j = 0; j < padded; j += kW) tile_max = persimmon_fast::cpu::PF_ISA::max(tile_max, load(scores + j));
  const float new_max = std::max(max, reduce_max(tile_max));
  const float shift = new_max == kMinusInf ? 0.0f : new_max;  // all scores -inf: weights 0, not NaN
  Vec tile_sum = Vec::zero();
  for (int j = 0; j < padded; j += kW) {
    const Vec weight = exp(load(scores + j) - Vec::set1(shift));
    tile_sum = tile_sum + weight;
    store(scores + j, weight);
  }
  const float rescale = max == new_max ? 1.0f : std::exp(max - shift);
  if (rescale != 1.0f) {
    for (int d = 0; d < head_dim; d += kW) store(acc + d, load(acc + d) * Vec::set1(rescale));
  }
  sum = sum * rescale + reduce_add(tile_sum);
  max = new_max;
}

inline int64_t visible_keys(const AttentionParams& p, const AttentionSequence& s, int64_t query) {
  return p.causal ? std::clamp<int64_t>(s.num_keys - s.num_queries + query + 1, 0, s.num_keys) : s.num_keys;
}

}  // namespace persimmon_fast::cpu::PF_ISA
