// Reductions over logits whose result does not depend on the order: what lm_head.cu and sample.cu share.
#pragma once

#include <cmath>

#include "csrc/cuda/device.cuh"
#include "csrc/cuda/lm_head.h"
#include "csrc/cuda/reduce.cuh"

namespace persimmon_fast::cuda {

// unsigned long long and not uint64_t: the type of CUDA's 64-bit atomics.
using u64 = unsigned long long;

DEV bool is_finite(float x) { return fabsf(x) < INFINITY; }  // false for NaN

// An integer that orders as the numbers do: -inf least, NaN above +inf; -0 and +0 are the same.
DEV uint32_t order_key(float x) {
  if (x != x) return 0xffffffffu;
  x += 0.0f;  // -0 becomes +0
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

// The number of a key; keys between numbers do not occur.
DEV float from_order_key(uint32_t key) {
  const uint32_t bits = (key & 0x80000000u) != 0 ? key & 0x7fffffffu : ~key;
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

// The larger of two of these has the larger number; of equal numbers, the lower token.
DEV u64 pack_best(float x, uint32_t token) { return static_cast<u64>(order_key(x)) << 32 | ~token; }
DEV uint32_t packed_token(u64 best) { return ~static_cast<uint32_t>(best); }
DEV uint32_t packed_key(u64 best) { return static_cast<uint32_t>(best >> 32); }

DEV u64 warp_max(u64 value) {
  return reduce_lanes<kWarpSize>(value, [](u64 a, u64 b) { return b > a ? b : a; });
}

// Of the block, in every thread. s_partial: one slot per warp; a barrier must lie between two uses of the same slots.
template <typename T, typename WarpReduce>
DEV T block_reduce(T value, T identity, T* s_partial, const WarpReduce& warp_reduce) {
  const int lane = threadIdx.x % kWarpSize;
  value = warp_reduce(value);
  if (lane == 0) s_partial[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  return warp_reduce(lane < static_cast<int>(blockDim.x) / kWarpSize ? s_partial[lane] : identity);
}

// Whether some (kAll: all) of the tokens begin .. end - 1 are in the ranges, which do not touch each other.
template <bool kAll>
DEV bool holds(const VocabRanges& ranges, int64_t begin, int64_t end) {
  bool found = ranges.count == 0;
  for (int i = 0; i < ranges.count; ++i) {
    found |= kAll ? ranges.begin[i] <= begin && end <= ranges.end[i] : ranges.begin[i] < end && begin < ranges.end[i];
  }
  return found;
}

// Statistics of a whole row.
struct RowStats {
  float max;
  double sum;  // of exp(logit - max); NaN where max is not finite: inf - inf, as log_softmax
  int32_t token;
};

// Merges the tiles of one row, by a block of kThreads: in an order that depends on num_tiles alone. Where max is
// finite all threads have read the tiles when one returns.
template <int kThreads>
DEV RowStats merge_tiles(const TileStats& tiles, int64_t row, int num_tiles) {
  STATIC_SMEM(u64, s_best, kThreads / kWarpSize);
  STATIC_SMEM(double, s_sum, kThreads / kWarpSize);
  const float* g_max = tiles.max + row * num_tiles;
  const float* g_sum = tiles.sum + row * num_tiles;
  const int32_t* g_token = tiles.token + row * num_tiles;
  u64 best = 0;
  for (int tile = threadIdx.x; tile < num_tiles; tile += kThreads) {
    const u64 candidate = pack_best(g_max[tile], static_cast<uint32_t>(g_token[tile]));
    best = candidate > best ? candidate : best;
  }
  best = block_reduce(best, u64{0}, s_best, [](u64 x) { return warp_max(x); });
  RowStats stats;
  stats.token = static_cast<int32_t>(packed_token(best));
  stats.max = from_order_key(packed_key(best));
  stats.sum = NAN;
  if (!is_finite(stats.max)) return stats;  // the same in every thread
  double sum = 0.0;
  for (int tile = threadIdx.x; tile < num_tiles; tile += kThreads) {
    sum += g_sum[tile] * exp(static_cast<double>(g_max[tile]) - stats.max);
  }
  stats.sum = block_reduce(sum, 0.0, s_sum, [](double x) { return sum_lanes(x); });
  return stats;
}

// Natural logarithm of the probability of a token with this logit.
DEV float logprob(float logit, float max, double sum) {
  return static_cast<float>(static_cast<double>(logit) - max - log(sum));
}

}  // namespace persimmon_fast::cuda
