// Top-p of sample.cu: finds the z at which the nucleus ends, exactly. Included there alone.
//
//   distance of order keys from the largest z, 32 bits:   [ bin of level 0 | bin of level 1 | bin of level 2 ]
//                                                             11 bits           11               10
//
// Level by level a histogram of probability (mass kernel, all blocks of the row) and the bin at which its running sum
// reaches top_p (narrow, by every block of the next kernel, from the same numbers). A bin of level 2 is one value of z:
// the nucleus takes all of its tokens, as ties at the boundary stay.
#pragma once

#include "csrc/cuda/device.cuh"
#include "csrc/cuda/lm_head_stats.cuh"
#include "csrc/cuda/sample.h"

namespace persimmon_fast::cuda {

constexpr int kPassThreads = 256;   // of mass and draw
constexpr float kFaintest = 64.0f;  // below the best z by more: no part of any sum in fp64
constexpr float kMassUnit = 0x1p39f;

// One row, as all passes see it.
struct RowLogits {
  float* values;    // [num_tiles, kVocabTile]
  float* tile_max;  // [num_tiles]
  int num_tiles;
};

DEV RowLogits row_logits(const SampleParams& p, int64_t row) {
  const int64_t num_tiles = num_vocab_tiles(p.vocab_size);
  return {p.logits + row * num_tiles * kVocabTile, p.tiles.max + row * num_tiles, static_cast<int>(num_tiles)};
}

// The 4 tokens of this lane: 4 * lane .. + 3 of the tile.
DEV float4 lane_logits(const RowLogits& row, int tile) {
  return reinterpret_cast<const float4*>(row.values + int64_t{tile} * kVocabTile)[threadIdx.x % kWarpSize];
}

DEV float max4(float4 v) { return fmaxf(fmaxf(v.x, v.y), fmaxf(v.z, v.w)); }
DEV float4 divide(float4 v, float divisor) {
  return make_float4(v.x / divisor, v.y / divisor, v.z / divisor, v.w / divisor);
}

// Bits of the distance that a bin of the level spans.
template <int kLevel>
constexpr int kBinBits = kLevel == 2   ? 0
                         : kLevel == 1 ? 10
                                       : 21;

DEV FixedMass operator+(FixedMass a, FixedMass b) { return {a.high + b.high, a.low + b.low}; }

// Probability relative to the best z, monotone in both parts.
DEV double to_double(FixedMass mass) {
  return static_cast<double>(mass.high) * 0x1p-39 + static_cast<double>(mass.low) * 0x1p-78;
}

// Finds the bin of the level at which the share of the probability reaches top_p; gives the state before the next
// level, in every thread of a block of kPassThreads.
template <int kLevel>
DEV NucleusState narrow(const SampleParams& p, int64_t row) {
  constexpr int kBinsPerThread = kNucleusBins / kPassThreads;
  constexpr int kWarps = kPassThreads / kWarpSize;
  STATIC_SMEM(FixedMass, s_warp, kWarps);
  STATIC_SMEM(NucleusState, s_next, 1);
  const FixedMass* g_mass =
      p.mass + (row * kNucleusLevels + kLevel) * kNucleusBins + int64_t{threadIdx.x} * kBinsPerThread;
  FixedMass own{0, 0};
#pragma unroll
  for (int i = 0; i < kBinsPerThread; ++i) own = own + g_mass[i];
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  FixedMass after = own;
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const FixedMass below{__shfl_up_sync(kFullMask, after.high, distance),
                          __shfl_up_sync(kFullMask, after.low, distance)};
    if (lane >= distance) after = after + below;
  }
  if (lane == kWarpSize - 1) s_warp[warp] = after;
  __syncthreads();
  FixedMass before{after.high - own.high, after.low - own.low};
  FixedMass total{0, 0};
#pragma unroll
  for (int i = 0; i < kWarps; ++i) {
    if (i < warp) before = before + s_warp[i];
    total = total + s_warp[i];
  }
  uint32_t begin = 0;
  if constexpr (kLevel > 0) {
    const NucleusState& state = p.rows[row].nucleus[kLevel];
    before = before + state.above;
    total = state.total;
    begin = state.begin;
  }

  const double top_p = p.top_p[row];
  const double divisor = to_double(total);
  // Shares grow from thread to thread up to that of the bin which this level splits (level 0: up to 1), exactly: one
  // thread has the bin.
  if ((threadIdx.x == 0 || to_double(before) / divisor < top_p) && to_double(before + own) / divisor >= top_p) {
    int bin = static_cast<int>(threadIdx.x) * kBinsPerThread;
    FixedMass above = before;
    for (int i = 0; i + 1 < kBinsPerThread; ++i) {
      const FixedMass next = above + g_mass[i];
      if (to_double(next) / divisor >= top_p) break;
      above = next;
      ++bin;
    }
    s_next[0] = {above, total, begin + (static_cast<uint32_t>(bin) << kBinBits<kLevel>)};
  }
  __syncthreads();
  return s_next[0];
}

// Adds to a sum in shared memory. A 64-bit atomic there is a compare-and-swap loop, so the halves are added apart; who
// makes a carry takes it to the upper half, and the sum is exact in any order.
DEV void add_shared(u64& sum, u64 value) {
  uint32_t* halves = reinterpret_cast<uint32_t*>(&sum);  // low, high
  const uint32_t low = static_cast<uint32_t>(value);
  const bool carries = atomicAdd(&halves[0], low) > ~low;
  const uint32_t high = static_cast<uint32_t>(value >> 32) + (carries ? 1 : 0);
  if (high != 0) atomicAdd(&halves[1], high);
}

DEV void add_mass(FixedMass& bin, double mass) {
  const double scaled = mass * kMassUnit;
  const u64 high = static_cast<u64>(scaled);
  const u64 low = static_cast<u64>((scaled - static_cast<double>(high)) * kMassUnit);
  add_shared(bin.high, high);
  add_shared(bin.low, low);
}

template <int kLevel>
__global__ void __launch_bounds__(kPassThreads) sample_mass_kernel(SampleParams p) {
  STATIC_SMEM(FixedMass, s_mass, kNucleusBins);
  const int64_t row = blockIdx.y;
  SampleRow& state = p.rows[row];
  if (state.mode != SampleMode::kNucleus) return;
  for (int bin = threadIdx.x; bin < kNucleusBins; bin += kPassThreads) s_mass[bin] = {0, 0};
  uint32_t begin = 0;
  if constexpr (kLevel > 0) {
    const NucleusState now = narrow<kLevel - 1>(p, row);
    begin = now.begin;
    if (blockIdx.x == 0 && threadIdx.x == 0) state.nucleus[kLevel] = now;
  }
  __syncthreads();

  const RowLogits logits = row_logits(p, row);
  const float best = state.best;
  const uint32_t best_key = order_key(best);
  const float faintest = fmaxf(state.top_k_threshold, best - kFaintest);
  constexpr uint64_t kSpan = uint64_t{kNucleusBins} << kBinBits<kLevel>;
  const auto add = [&](float z) {
    const uint32_t distance = best_key - order_key(z) - begin;  // wraps where z lies in an earlier bin
    if (z >= faintest && distance < kSpan) {
      add_mass(s_mass[distance >> kBinBits<kLevel>], exp(static_cast<double>(z) - best));
    }
  };
  const int end = min((static_cast<int>(blockIdx.x) + 1) * kTilesPerBlock, logits.num_tiles);
  for (int tile = blockIdx.x * kTilesPerBlock + threadIdx.x / kWarpSize; tile < end; tile += kPassThreads / kWarpSize) {
    const float tile_best = logits.tile_max[tile] / state.divisor;
    if (tile_best < faintest || uint64_t{best_key - order_key(tile_best)} >= begin + kSpan) continue;
    const float4 z = divide(lane_logits(logits, tile), state.divisor);
    add(z.x);
    add(z.y);
    add(z.z);
    add(z.w);
  }
  __syncthreads();
  FixedMass* g_mass = p.mass + (row * kNucleusLevels + kLevel) * kNucleusBins;
  for (int bin = threadIdx.x; bin < kNucleusBins; bin += kPassThreads) {
    const FixedMass mass = s_mass[bin];
    if (mass.high != 0) atomicAdd(&g_mass[bin].high, mass.high);
    if (mass.low != 0) atomicAdd(&g_mass[bin].low, mass.low);
  }
}

}  // namespace persimmon_fast::cuda
