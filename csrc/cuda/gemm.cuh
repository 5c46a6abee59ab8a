// gemm_kernel: epilogue(transform(A) B^T) for fp16 and bf16 on tensor cores.
// launch_gemm: that, or the same in fp32 (gemm_simt.cuh), or for sm_90a (gemm_sm90.cuh).
//
// Tile      128 x 128, or 64 x 64 (64 x 128) for few rows and bad last waves (gemm_tile.h); 4 warps in 2 x 2, each with
//           a quarter of it; k in steps of 32 through a ring of 4 stages:
//
//             stage   | kt-1, kt+3 |   kt   |  kt+1  |  kt+2  |    cp.async fills the stage that the barrier at the
//                     |   filling  | in use | flight | flight |    end of kt-1 freed; one barrier per k-tile
//             warp    | mma step 0  | mma step 1   |               the fragments of the next step (in step 1: of the
//                     | ldmatrix 1  | ldmatrix 0'  |               next stage, after wait and barrier) are read during
//                                                                  the mma of this one, into a second set of registers
//
// Layout    A and K-major B: rows of 64 bytes, 16-byte chunk c of row r at c ^ (r / 2 % 4). N-major B: rows of one k,
//           chunk c at c ^ (k % 8), read by ldmatrix.trans. Neither ldmatrix nor cp.async meets a bank conflict. The
//           results replace the ring, in fp32, for the epilogue (gemm_epilogue.cuh)
// Traffic   B once per 16 row tiles, A once per wave, in tile_of_block's order; what repeats is read from L2
// Bound     tensor cores from about 150 rows on; below, the bytes of B
// Numerics  fp32 sums over k in ascending steps of 16, whatever the tile: the bits of a row depend on nothing but the
//           row and B. Tails are multiplied as zeros
// Requires  nothing of alignment: where a row, a pointer or the contiguous size is no multiple of 16 bytes, elements
//           are copied one by one (small tile)
// Measured  on no GPU yet
// Source    multistage pipeline and swizzled ldmatrix tiles as in NVIDIA's CUTLASS 2.x (github.com/NVIDIA/cutlass);
//           grouped tile order as in Triton's matrix multiplication tutorial; written for this project
#pragma once

#include <type_traits>

#include "csrc/cuda/convert.cuh"
#include "csrc/cuda/device_limits.h"
#include "csrc/cuda/gemm_common.cuh"
#include "csrc/cuda/gemm_simt.cuh"
#include "csrc/cuda/gemm_sm90.cuh"
#include "csrc/cuda/ptx.cuh"

namespace persimmon_fast::cuda {

// kMinBlocks: blocks per multiprocessor that the registers must allow.
template <int kBlockM_, int kBlockN_, int kMinBlocks_>
struct GemmShape {
  static constexpr int kBlockM = kBlockM_;
  static constexpr int kBlockN = kBlockN_;
  static constexpr int kBlockK = 32;
  static constexpr int kMinBlocks = kMinBlocks_;
  static constexpr int kThreads = 128;
  static constexpr int kStages = 4;
  static constexpr int kWarpM = kBlockM / 2;
  static constexpr int kWarpN = kBlockN / 2;
  static constexpr int kFragmentsM = kWarpM / 16;
  static constexpr int kFragmentsN = kWarpN / 16;  // ldmatrix.x4 brings two n8 operands of mma
  static constexpr int kBytesA = kBlockM * kBlockK * 2;
  static constexpr int kStageBytes = kBytesA + kBlockN * kBlockK * 2;
  static constexpr int kStagedBytes = kBlockM * kBlockN * 4;
  static constexpr size_t kSmemBytes = kStages * kStageBytes > kStagedBytes ? kStages * kStageBytes : kStagedBytes;
  static_assert(kSmemBytes <= kMaxSmemBytes, "a block must fit on sm_86");
};
using LargeShape = GemmShape<128, 128, 2>;
template <int kBlockN>
using SmallShape = GemmShape<64, kBlockN, kBlockN == 64 ? 4 : 3>;
template <int kBlockN>
using UnalignedShape = GemmShape<64, kBlockN, kBlockN == 64 ? 4 : 2>;  // 3 spilled with the epilogue of lm_head

// Copies a tile of kRows x kChunks * 8 elements; what lies outside the matrix, which has `rows` rows and `cols` columns
// from the tile's corner on, becomes zero. kAligned: every chunk is whole and 16-byte aligned, and arrives with the
// cp.async group that is committed next; else at once.
template <int kRows, int kChunks, int kThreads, bool kAligned>
DEV void load_tile(unsigned char* s_tile, const uint16_t* g_tile, int64_t row_stride, int rows, int cols) {
  constexpr int kRowsPerPass = kThreads / kChunks;
  static_assert(kRowsPerPass % 8 == 0, "the swizzle is the same in every pass");
  const int first_row = threadIdx.x / kChunks;
  const int chunk = threadIdx.x % kChunks;
  const int elements = min(cols - chunk * 8, 8);
  const uint16_t* g_chunk = g_tile + first_row * row_stride + chunk * 8;
  unsigned char* s_first = s_tile + swizzled<kChunks>(first_row, chunk);
#pragma unroll
  for (int pass = 0; pass < kRows / kRowsPerPass; ++pass) {
    const bool row_exists = first_row + pass * kRowsPerPass < rows;
    unsigned char* s_chunk = s_first + pass * kRowsPerPass * kChunks * 16;
    if constexpr (kAligned) {
      ptx::cp_async16(ptx::smem_u32(s_chunk), g_chunk, row_exists && elements > 0 ? 16 : 0);
    } else {
      Chunk<uint16_t> copy = {};
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (row_exists && i < elements) copy.values[i] = g_chunk[i];
      }
      store_chunk<true>(reinterpret_cast<uint16_t*>(s_chunk), copy, 8);
    }
    g_chunk += kRowsPerPass * row_stride;
  }
}

template <typename scalar_t, typename Shape, BOrder kBOrder, bool kAligned, typename Transform, typename Epilogue>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kMinBlocks)
    gemm_kernel(GemmKernelParams<Transform, Epilogue> p) {
  constexpr int kBlockM = Shape::kBlockM;
  constexpr int kBlockN = Shape::kBlockN;
  constexpr int kBlockK = Shape::kBlockK;
  constexpr int kStages = Shape::kStages;
  constexpr int kSteps = kBlockK / 16;
  constexpr bool kKMajor = kBOrder == BOrder::kKMajor;
  SMEM_CARVER(smem);
  unsigned char* s_bytes = smem.take<unsigned char>(Shape::kSmemBytes, 128);
  const GemmOperands& g = p.operands;
  const TilePlace place = tile_place<kBlockM, kBlockN>(g);
  if (skip_tile(p.epilogue, place.row0, place.col0, place.rows)) return;
  const uint16_t* g_a = static_cast<const uint16_t*>(g.a) + place.row0 * g.a_row_stride;
  const uint16_t* g_b = static_cast<const uint16_t*>(g.b) + (kKMajor ? place.col0 * g.b_row_stride : place.col0);
  const int k = static_cast<int>(g.k);
  const int k_tiles = ceil_div(k, kBlockK);
  const int lane = threadIdx.x % kWarpSize;
  const int warp_row = threadIdx.x / kWarpSize / 2 * Shape::kWarpM;
  const int warp_col = threadIdx.x / kWarpSize % 2 * Shape::kWarpN;

  const auto issue = [&](int k_tile) {
    unsigned char* s_stage = s_bytes + k_tile % kStages * Shape::kStageBytes;
    const int k0 = k_tile * kBlockK;
    load_tile<kBlockM, 4, Shape::kThreads, kAligned>(s_stage, g_a + k0, g.a_row_stride, place.rows, k - k0);
    if constexpr (kKMajor) {
      load_tile<kBlockN, 4, Shape::kThreads, kAligned>(s_stage + Shape::kBytesA, g_b + k0, g.b_row_stride, place.cols,
                                                       k - k0);
    } else {
      load_tile<kBlockK, kBlockN / 8, Shape::kThreads, kAligned>(s_stage + Shape::kBytesA, g_b + k0 * g.b_row_stride,
                                                                 g.b_row_stride, k - k0, place.cols);
    }
  };

  uint32_t r_a[2][Shape::kFragmentsM][4];
  uint32_t r_b[2][Shape::kFragmentsN][4];  // [0], [1]: columns 0..7; [2], [3]: columns 8..15
  const auto load_fragments = [&](int k_tile, int step, int set) {
    const uint32_t s_a = ptx::smem_u32(s_bytes) + k_tile % kStages * Shape::kStageBytes;
    const uint32_t s_b = s_a + Shape::kBytesA;
#pragma unroll
    for (int i = 0; i < Shape::kFragmentsM; ++i) {
      ptx::ldmatrix(r_a[set][i], s_a + swizzled<4>(warp_row + i * 16 + lane % 16, step * 2 + lane / 16));
    }
#pragma unroll
    for (int j = 0; j < Shape::kFragmentsN; ++j) {
      if constexpr (kKMajor) {
        const int row = warp_col + j * 16 + lane % 8 + lane / 16 * 8;
        ptx::ldmatrix(r_b[set][j], s_b + swizzled<4>(row, step * 2 + lane / 8 % 2));
      } else {
        const int row = step * 16 + lane % 16;
        ptx::ldmatrix_trans(r_b[set][j], s_b + swizzled<kBlockN / 8>(row, (warp_col + j * 16) / 8 + lane / 16));
      }
    }
  };

  uint32_t r_factor[Shape::kFragmentsM][2];
#pragma unroll
  for (int i = 0; i < Shape::kFragmentsM; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row + i * 16 + half * 8 + lane / 4;
      r_factor[i][half] = row < place.rows ? p.transform.factor(place.row0 + row) : 0;
    }
  }

  float r_acc[Shape::kFragmentsM][Shape::kFragmentsN * 2][4] = {};
#pragma unroll
  for (int k_tile = 0; k_tile < kStages - 1; ++k_tile) {
    if (k_tile < k_tiles) issue(k_tile);
    ptx::cp_async_commit();  // empty groups too: the number of groups counts the k-tiles
  }
  ptx::cp_async_wait<kStages - 2>();
  __syncthreads();
  load_fragments(0, 0, 0);
#pragma unroll 1
  for (int k_tile = 0; k_tile < k_tiles; ++k_tile) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (step == 0) {
        if (k_tile + kStages - 1 < k_tiles) issue(k_tile + kStages - 1);
        ptx::cp_async_commit();
      }
      if (step + 1 < kSteps) {
        load_fragments(k_tile, step + 1, (step + 1) % 2);
      } else if (k_tile + 1 < k_tiles) {
        ptx::cp_async_wait<kStages - 2>();  // the next k-tile is here, for this thread ...
        __syncthreads();                    // ... and for all, and all have read this one
        load_fragments(k_tile + 1, 0, 0);
      }
#pragma unroll
      for (int i = 0; i < Shape::kFragmentsM; ++i) {
        p.transform.apply(r_a[step % 2][i], r_factor[i][0], r_factor[i][1]);
#pragma unroll
        for (int j = 0; j < Shape::kFragmentsN * 2; ++j) {
          const uint32_t (&pair)[4] = r_b[step % 2][j / 2];
          const uint32_t b[2] = {pair[j % 2 * 2], pair[j % 2 * 2 + 1]};
          ptx::mma(r_acc[i][j], r_a[step % 2][i], b, scalar_t{});
        }
      }
    }
  }

  __syncthreads();  // all have read the last k-tile, and no copy is in flight: the results may replace the ring
  const StagedTile<kBlockM, kBlockN, Shape::kThreads> tile{reinterpret_cast<float*>(s_bytes), place.row0, place.col0,
                                                           place.rows, place.cols};
#pragma unroll
  for (int i = 0; i < Shape::kFragmentsM; ++i) {
#pragma unroll
    for (int j = 0; j < Shape::kFragmentsN * 2; ++j) {
      const int row = warp_row + i * 16 + lane / 4;
      const int col = warp_col + j * 8 + lane % 4 * 2;
      *reinterpret_cast<float2*>(&tile.at(row, col)) = make_float2(r_acc[i][j][0], r_acc[i][j][1]);
      *reinterpret_cast<float2*>(&tile.at(row + 8, col)) = make_float2(r_acc[i][j][2], r_acc[i][j][3]);
    }
  }
  __syncthreads();
  p.epilogue(tile);
}

// Enqueues epilogue(transform(A) B^T); scalar_t: of A and B. kSmallBlockN: columns of the small tile, 64, or 128 where
// the epilogue needs segments of 128; tiles start at multiples of it. fp32 takes no transform.
template <typename scalar_t, BOrder kBOrder, int kSmallBlockN = 64, typename Epilogue, typename Transform = Unchanged>
cudaError_t launch_gemm(const char* name, const GemmOperands& g, const Epilogue& epilogue, int num_multiprocessors,
                        cudaStream_t stream, const Transform& transform = {}) {
  if (g.m == 0 || g.n == 0) return cudaSuccess;
  const GemmKernelParams<Transform, Epilogue> params{g, transform, epilogue};
  if constexpr (std::is_same_v<scalar_t, float>) {
    static_assert(std::is_same_v<Transform, Unchanged>, "no fp32 product needs one");
    using Shape = SimtShape<kSmallBlockN>;
    return launch_tiles<Shape>(name, gemm_simt_kernel<Shape, kBOrder, Epilogue>, Shape::kSmemFloats * sizeof(float),
                               stream, params);
  } else {
    if constexpr (kBuiltSm90a && CanFinishOnSm90<Epilogue>::value) {
      DeviceLimits limits;
      if (const cudaError_t error = device_limits(limits); error != cudaSuccess) return error;
      if (limits.runs_sm90a && sm90_takes<kBOrder>(g, epilogue)) {
        return launch_gemm_sm90<scalar_t, kBOrder, kSmallBlockN>(name, g, epilogue, num_multiprocessors, stream,
                                                                 transform);
      }
    }
    using Small = SmallShape<kSmallBlockN>;
    const int64_t dense_b = kBOrder == BOrder::kKMajor ? g.k : g.n;
    const bool aligned = is_aligned(g.a) && is_aligned(g.b) && g.k % 8 == 0 && dense_b % 8 == 0 &&
                         g.a_row_stride % 8 == 0 && g.b_row_stride % 8 == 0;
    if (!aligned) {
      using Unaligned = UnalignedShape<kSmallBlockN>;
      return launch_tiles<Unaligned>(name, gemm_kernel<scalar_t, Unaligned, kBOrder, false, Transform, Epilogue>,
                                     Unaligned::kSmemBytes, stream, params);
    }
    if (choose_gemm_tile(g.m, g.n, num_multiprocessors, kSmallBlockN) == GemmTile::kLarge) {
      return launch_tiles<LargeShape>(name, gemm_kernel<scalar_t, LargeShape, kBOrder, true, Transform, Epilogue>,
                                      LargeShape::kSmemBytes, stream, params);
    }
    return launch_tiles<Small>(name, gemm_kernel<scalar_t, Small, kBOrder, true, Transform, Epilogue>,
                               Small::kSmemBytes, stream, params);
  }
}

}  // namespace persimmon_fast::cuda
