// How a weight-streaming product (stream.cuh) uses a multiprocessor, for its callers: without CUDA's language, tested
// without a GPU.
#pragma once

#include <cstddef>
#include <cstdint>

#include "csrc/common/ceil_div.h"
#include "csrc/cuda/device_limits.h"

namespace persimmon_fast::cuda {

constexpr int kStreamMaxRows = 16;  // rows of x: of one mma.m16n8k16
constexpr int kStreamWarps = 8;
constexpr int kStreamStages = 3;
constexpr int kStreamGroup = 16;       // weight rows that a block multiplies at a time
constexpr int kStreamStepBytes = 128;  // of a weight row: what a warp takes of it at a time
constexpr size_t kStreamRingBytes = size_t{kStreamStages} * kStreamWarps * kStreamGroup * kStreamStepBytes;

constexpr int64_t stream_steps(int64_t k, int64_t element_bytes) {
  return ceil_div<int64_t>(k * element_bytes, kStreamStepBytes);
}

// Bytes of shared memory: of x, of the partial sums (two buffers), of the finished sums of a unit of weight rows.
constexpr size_t stream_x_bytes(int64_t rows, int64_t k, int64_t element_bytes) {
  return static_cast<size_t>(rows * stream_steps(k, element_bytes)) * kStreamStepBytes;
}
constexpr size_t stream_partial_bytes(int64_t rows) {
  return static_cast<size_t>(2 * kStreamWarps * rows * kStreamGroup) * sizeof(float);
}
constexpr size_t stream_staged_bytes(int unit) { return static_cast<size_t>(kStreamMaxRows * unit) * sizeof(float); }

struct StreamPlan {
  bool x_in_shared;  // else its fragments are read from global memory, every time
  int blocks_per_multiprocessor;
  size_t smem_bytes;
};

// rows: 1 .. kStreamMaxRows. unit: weight rows of an epilogue's tile. The results are the same bits in every plan.
constexpr StreamPlan plan_stream(int64_t rows, int64_t k, int64_t element_bytes, int unit, const DeviceLimits& limits) {
  constexpr size_t kReserved = 1024;  // of each block, by the system
  const size_t without_x = kStreamRingBytes + stream_partial_bytes(rows) + stream_staged_bytes(unit);
  const size_t with_x = without_x + stream_x_bytes(rows, k, element_bytes);
  const bool fits = with_x <= limits.smem_per_block;
  const size_t smem_bytes = fits ? with_x : without_x;
  // Two blocks: one multiplies while the other waits at a barrier, finishes a unit or starts.
  const bool two = 2 * (smem_bytes + kReserved) <= limits.smem_per_multiprocessor;
  return {fits, two ? 2 : 1, smem_bytes};
}

// LayerNorm of the input, rounded to its dtype: the bits of layer_norm followed by the product.
struct StreamNorm {
  const void* weight;  // [k]; null: none
  const void* bias;    // [k]
  float eps;
};

// Whether a product takes a StreamNorm on the current device; if not, its input must be normalised before.
inline bool stream_normalises(int64_t rows, int64_t k, int64_t element_bytes, int unit) {
  DeviceLimits limits;
  if (rows == 0 || rows > kStreamMaxRows || device_limits(limits) != cudaSuccess) return false;
  return plan_stream(rows, k, element_bytes, unit, limits).x_in_shared;
}

}  // namespace persimmon_fast::cuda
