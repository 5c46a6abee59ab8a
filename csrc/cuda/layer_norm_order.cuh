// LayerNorm of a row in a fixed order: which thread adds what, and the formulas. Shared by layer_norm.cu and by the
// products that normalise their input (stream_input.cuh), so that both give the same bits.
//
// Threads 0 .. threads - 1 take the chunks i, i + threads, ... of 16 bytes of a row, in ascending order; the sums of a
// warp's threads are added by sum_lanes, those of the warps again by sum_lanes, one per lane, zeros behind them.
#pragma once

#include <cstdint>

#include "csrc/cuda/device.cuh"
#include "csrc/cuda/reduce.cuh"

namespace persimmon_fast::cuda {

// 1024 would leave 64 registers, and unaligned bf16 rows spilled (sm_90a); so did 512 without the 1 in
// __launch_bounds__, where ptxas makes room for two blocks.
constexpr int kLayerNormMaxThreads = 512;
constexpr int kLayerNormMinThreads = 128;  // of a block; in the warp-per-row kernel: exactly

// Chunks that a thread keeps in registers.
template <bool kWarpPerRow>
constexpr int kHeldChunks = kWarpPerRow ? 4 : 2;

struct LayerNormGroup {
  bool warp_per_row;
  int threads;  // that share a row
};

// Two chunks per thread while that gives a block of allowed size: for the model's 4096 columns 256 threads in 16-bit
// types and 512 in fp32.
constexpr LayerNormGroup layer_norm_group(int64_t num_chunks) {
  if (num_chunks <= kWarpSize * kHeldChunks<true>) return {true, kWarpSize};
  const int64_t wanted = ((num_chunks + 1) / 2 + kWarpSize - 1) / kWarpSize * kWarpSize;
  if (wanted < kLayerNormMinThreads) return {false, kLayerNormMinThreads};
  return {false, wanted < kLayerNormMaxThreads ? static_cast<int>(wanted) : kLayerNormMaxThreads};
}

struct LayerNormStats {
  float rough_mean;
  float correction;  // what the mean's rounding left
  float rstd;
};

// deviations, squares: sums of x - rough_mean and of its square.
DEV LayerNormStats layer_norm_stats(float rough_mean, float deviations, float squares, int size, float eps) {
  const float correction = deviations / size;
  const float variance = fmaf(-correction, correction, squares / size);
  // variance - variance: 0, or NaN where the squares overflowed, which 1 / inf would hide. fmaxf would turn NaN into 0.
  const float rstd = 1.0f / sqrtf((variance < 0.0f ? 0.0f : variance + (variance - variance)) + eps);
  return {rough_mean, correction, rstd};
}

DEV float layer_norm_value(float x, const LayerNormStats& stats, float weight, float bias) {
  return fmaf(((x - stats.rough_mean) - stats.correction) * stats.rstd, weight, bias);
}

}  // namespace persimmon_fast::cuda
