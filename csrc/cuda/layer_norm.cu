// layer_norm_kernel: out[t, c] = (s[t, c] - mean_t) / sqrt(var_t + eps) * weight[c] + bias[c],  s = x (+ residual)
//
// Tile      one row = one group of threads: a warp (4 rows per block of 128) for rows of up to 128 chunks of 16 bytes,
//           else a block of 128 to 512. Thread i owns chunks i, i + group, ... and holds the first kHeldChunks in
//           registers, so a row is read once. Rows beyond 2 chunks x 512 threads (8,192 16-bit or 4,096 fp32
//           elements) are read again, from L1 or L2, in each pass
// Traffic   x (and residual) read once, out (and sum) written once; weight and bias are served by L2
// Bound     memory for many rows; for one row latency: two reductions, the second over two values at once
// Resources ptxas -v, registers per thread (sm_80; sm_90a), no spills on 8.0, 8.6, 8.9, 9.0a. Aligned bf16: block 48;
//           48, warp 64; 80. Aligned fp32: block 40; 37, warp 52; 53. Unaligned bf16: block 92; 109, warp 72; 110. 256
//           B shared in the block kernel, none in the warp kernel
// Numerics  fp32 two-pass statistics; the rounding error of the mean is measured and taken off the deviations, so rows
//           whose mean is far from zero lose nothing. The sum is rounded to the dtype before it is normalised. Which
//           thread adds what depends on hidden_size and dtype alone: the bits of a row change neither with num_rows nor
//           with alignment or strides
// Requires  hidden_size > 0, rows dense (csrc/ops/layer_norm.cpp); 16-byte accesses where every row starts aligned
// Measured  on no GPU yet
// Source    Ba et al. 2016, Layer Normalization, arXiv:1607.06450; kernel written for this project
#include "csrc/cuda/layer_norm.h"

#include <cstdint>

#include "csrc/cuda/convert.cuh"
#include "csrc/cuda/device.cuh"
#include "csrc/cuda/dispatch.h"
#include "csrc/cuda/layer_norm_order.cuh"

namespace persimmon_fast::cuda {
namespace {

DEV float2 warp_sum(float2 value) { return make_float2(sum_lanes(value.x), sum_lanes(value.y)); }

// Sums of the group that shares a row, in every thread of it. s_partial: one slot per warp, used once per call, so no
// barrier is needed before it is written.
template <bool kWarpPerRow>
DEV float2 group_sum(float2 value, float2* s_partial) {
  value = warp_sum(value);
  if constexpr (!kWarpPerRow) {
    const int lane = threadIdx.x % kWarpSize;
    if (lane == 0) s_partial[threadIdx.x / kWarpSize] = value;
    __syncthreads();
    value = lane < static_cast<int>(blockDim.x) / kWarpSize ? s_partial[lane] : make_float2(0.0f, 0.0f);
    value = warp_sum(value);
  }
  return value;
}

// x, residual: [num_rows, hidden_size] with their row strides; sum, out: [num_rows, hidden_size] contiguous;
// weight, bias: [hidden_size]. kAligned: every chunk of every tensor is whole and 16-byte aligned.
template <typename scalar_t, bool kWarpPerRow, bool kAligned>
__global__ void __launch_bounds__(kWarpPerRow ? kLayerNormMinThreads : kLayerNormMaxThreads, 1)
    layer_norm_kernel(LayerNormParams p) {
  constexpr int kChunk = Chunk<scalar_t>::kSize;
  constexpr int kHeld = kHeldChunks<kWarpPerRow>;
  constexpr int kMaxWarps = kLayerNormMaxThreads / kWarpSize;
  STATIC_SMEM(float2, s_partial, 2 * kMaxWarps);
  const int group = kWarpPerRow ? kWarpSize : blockDim.x;
  const int rank = kWarpPerRow ? threadIdx.x % kWarpSize : threadIdx.x;
  const int64_t row = kWarpPerRow ? blockIdx.x * int64_t{kLayerNormMinThreads / kWarpSize} + threadIdx.x / kWarpSize
                                  : static_cast<int64_t>(blockIdx.x);
  if (kWarpPerRow && row >= p.num_rows) return;  // whole warps: no barrier follows in this kernel

  const int size = static_cast<int>(p.hidden_size);
  const int tile = group * kChunk * kHeld;
  const bool held = size <= tile;  // the row fits in registers
  const scalar_t* g_row = static_cast<const scalar_t*>(p.x) + row * p.x_row_stride;
  const scalar_t* g_residual =
      p.residual == nullptr ? nullptr : static_cast<const scalar_t*>(p.residual) + row * p.residual_row_stride;
  scalar_t* g_sum = p.residual == nullptr ? nullptr : static_cast<scalar_t*>(p.sum) + row * p.hidden_size;
  scalar_t* g_out = static_cast<scalar_t*>(p.out) + row * p.hidden_size;

  // Calls body(k, column, n) for the chunks of this thread in the tile at `begin`: held chunk k is columns
  // column .. column + n of the row.
  const auto for_chunks = [&](int begin, auto body) {
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      const int column = begin + (k * group + rank) * kChunk;
      if (column < size) body(k, column, min(size - column, kChunk));
    }
  };
  Chunk<scalar_t> r_row[kHeld];

  // Pass 1: the sum with the residual, and the mean.
  float2 total = make_float2(0.0f, 0.0f);
  for (int begin = 0; begin < size; begin += tile) {
    for_chunks(begin, [&](int k, int column, int n) {
      r_row[k] = load_chunk<kAligned>(g_row + column, n);
      if (g_residual != nullptr) {
        const Chunk<scalar_t> residual = load_chunk<kAligned>(g_residual + column, n);
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
          from_float(to_float(r_row[k].values[i]) + to_float(residual.values[i]), r_row[k].values[i]);
        }
        store_chunk<kAligned>(g_sum + column, r_row[k], n);
      }
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        if (kAligned || i < n) total.x += to_float(r_row[k].values[i]);
      }
    });
  }
  const float rough_mean = group_sum<kWarpPerRow>(total, s_partial).x / size;
  if (g_residual != nullptr) g_row = g_sum;  // what is read again: each thread reads only what it wrote

  // Pass 2: deviations from the rounded mean. Their own mean corrects it, their squares give the variance.
  float2 deviation = make_float2(0.0f, 0.0f);  // sum, sum of squares
  for (int begin = 0; begin < size; begin += tile) {
    for_chunks(begin, [&](int k, int column, int n) {
      if (!held) r_row[k] = load_chunk<kAligned>(g_row + column, n);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        if (kAligned || i < n) {
          const float d = to_float(r_row[k].values[i]) - rough_mean;
          deviation.x += d;
          deviation.y = fmaf(d, d, deviation.y);
        }
      }
    });
  }
  deviation = group_sum<kWarpPerRow>(deviation, s_partial + kMaxWarps);
  const LayerNormStats stats = layer_norm_stats(rough_mean, deviation.x, deviation.y, size, p.eps);

  // Pass 3: the output.
  const scalar_t* g_weight = static_cast<const scalar_t*>(p.weight);
  const scalar_t* g_bias = static_cast<const scalar_t*>(p.bias);
  for (int begin = 0; begin < size; begin += tile) {
    for_chunks(begin, [&](int k, int column, int n) {
      if (!held) r_row[k] = load_chunk<kAligned>(g_row + column, n);
      const Chunk<scalar_t> weight = load_chunk<kAligned>(g_weight + column, n);
      const Chunk<scalar_t> bias = load_chunk<kAligned>(g_bias + column, n);
      Chunk<scalar_t> out;
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        from_float(
            layer_norm_value(to_float(r_row[k].values[i]), stats, to_float(weight.values[i]), to_float(bias.values[i])),
            out.values[i]);
      }
      store_chunk<kAligned>(g_out + column, out, n);
    });
  }
}

template <typename scalar_t>
cudaError_t launch_typed(const LayerNormParams& p, cudaStream_t stream) {
  constexpr int kChunk = Chunk<scalar_t>::kSize;
  const bool aligned = p.hidden_size % kChunk == 0 && p.x_row_stride % kChunk == 0 &&
                       p.residual_row_stride % kChunk == 0 && is_aligned(p.x) && is_aligned(p.residual) &&
                       is_aligned(p.weight) && is_aligned(p.bias) && is_aligned(p.sum) && is_aligned(p.out);
  const int64_t num_chunks = (p.hidden_size + kChunk - 1) / kChunk;
  const LayerNormGroup group = layer_norm_group(num_chunks);
  constexpr int64_t kRowsPerBlock = kLayerNormMinThreads / kWarpSize;
  const int64_t num_blocks = group.warp_per_row ? (p.num_rows + kRowsPerBlock - 1) / kRowsPerBlock : p.num_rows;
  // Columns are 32-bit inside a row, with room for one tile past its end; offsets of rows are 64-bit.
  constexpr int64_t kMaxTile = int64_t{kLayerNormMaxThreads} * kChunk * kHeldChunks<false>;
  if (num_blocks > INT32_MAX || p.hidden_size > INT32_MAX - kMaxTile) return kTooLarge;
  const int num_threads = group.warp_per_row ? kLayerNormMinThreads : group.threads;

  const auto kernel =
      group.warp_per_row
          ? (aligned ? layer_norm_kernel<scalar_t, true, true> : layer_norm_kernel<scalar_t, true, false>)
          : (aligned ? layer_norm_kernel<scalar_t, false, true> : layer_norm_kernel<scalar_t, false, false>);
  return launch("layer_norm", kernel, static_cast<unsigned>(num_blocks), num_threads, 0, stream, p);
}

}  // namespace

cudaError_t launch_layer_norm(const LayerNormParams& params, cudaStream_t stream) {
  if (params.num_rows == 0) return cudaSuccess;
  return dispatch_dtype(params.dtype, [&](auto scalar) { return launch_typed<decltype(scalar)>(params, stream); });
}

}  // namespace persimmon_fast::cuda
