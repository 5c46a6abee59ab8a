// gemm_simt_kernel: epilogue(A B^T) in fp32 on the CUDA cores; tensor cores would round the operands to TF32.
//
// Tile      64 rows x kBlockN columns x 16 of k; 256 threads, each 4 rows x kBlockN / 16 columns. The next k-tile waits
//           in registers while this one is multiplied
// Bound     fp32 FMA: 2 16-byte shared reads per 16 FMA (3 per 32 for kBlockN = 128)
// Numerics  one fma per k in ascending order: the bits of a row depend on nothing but the row and B
// Source    written for this project
#pragma once

#include "csrc/cuda/gemm_common.cuh"

namespace persimmon_fast::cuda {

template <int kBlockN_>
struct SimtShape {
  static constexpr int kBlockM = 64;
  static constexpr int kBlockN = kBlockN_;
  static constexpr int kBlockK = 16;
  static constexpr int kThreads = 256;
  static constexpr int kPadding = 4;  // floats: keeps rows 16-byte aligned and spreads a transposed write over banks
  static constexpr size_t kRingFloats = kBlockK * (kBlockM + kPadding + kBlockN + kPadding);
  static constexpr size_t kStagedFloats = kBlockM * kBlockN;
  static constexpr size_t kSmemFloats = kRingFloats > kStagedFloats ? kRingFloats : kStagedFloats;
};

// Element i of thread t is number t + i * kThreads of the tile [kSize rows, kBlockK] (kKMajor) or [kBlockK, kSize].
template <int kSize, bool kKMajor, int kThreads>
struct SimtOperand {
  static constexpr int kBlockK = 16;
  static constexpr int kCount = kSize * kBlockK / kThreads;
  float values[kCount];

  DEV static int row_of(int i) { return (threadIdx.x + i * kThreads) / (kKMajor ? kBlockK : kSize); }
  DEV static int col_of(int i) { return (threadIdx.x + i * kThreads) % (kKMajor ? kBlockK : kSize); }

  // g_tile: the tile's corner; rows, cols: how much of the matrix there is from the corner on.
  DEV void load(const float* g_tile, int64_t row_stride, int rows, int cols) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int row = row_of(i);
      const int col = col_of(i);
      values[i] = row < rows && col < cols ? g_tile[row * row_stride + col] : 0.0f;
    }
  }
  // s_tile: [kBlockK, kSize] with rows of `pitch` floats.
  DEV void store(float* s_tile, int pitch) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      s_tile[kKMajor ? col_of(i) * pitch + row_of(i) : row_of(i) * pitch + col_of(i)] = values[i];
    }
  }
};

template <typename Shape, BOrder kBOrder, typename Epilogue>
__global__ void __launch_bounds__(Shape::kThreads) gemm_simt_kernel(GemmKernelParams<Unchanged, Epilogue> p) {
  constexpr int kBlockM = Shape::kBlockM;
  constexpr int kBlockN = Shape::kBlockN;
  constexpr int kBlockK = Shape::kBlockK;
  constexpr int kPitchA = kBlockM + Shape::kPadding;
  constexpr int kPitchB = kBlockN + Shape::kPadding;
  constexpr bool kKMajor = kBOrder == BOrder::kKMajor;
  SMEM_CARVER(smem);
  float* s_floats = smem.take<float>(Shape::kSmemFloats, 16);
  float* s_a = s_floats;
  float* s_b = s_floats + kBlockK * kPitchA;
  const GemmOperands& g = p.operands;
  const TilePlace place = tile_place<kBlockM, kBlockN>(g);
  if (skip_tile(p.epilogue, place.row0, place.col0, place.rows)) return;
  const float* g_a = static_cast<const float*>(g.a) + place.row0 * g.a_row_stride;
  const float* g_b = static_cast<const float*>(g.b) + (kKMajor ? place.col0 * g.b_row_stride : place.col0);
  const int k = static_cast<int>(g.k);
  const int row = threadIdx.x / 16 * 4;
  const int col = threadIdx.x % 16 * 4;

  SimtOperand<kBlockM, true, Shape::kThreads> r_a;
  SimtOperand<kBlockN, kKMajor, Shape::kThreads> r_b;
  const auto load = [&](int k0) {
    r_a.load(g_a + k0, g.a_row_stride, place.rows, k - k0);
    if constexpr (kKMajor) {
      r_b.load(g_b + k0, g.b_row_stride, place.cols, k - k0);
    } else {
      r_b.load(g_b + k0 * g.b_row_stride, g.b_row_stride, k - k0, place.cols);
    }
  };

  float r_acc[4][kBlockN / 16] = {};
  load(0);
  for (int k0 = 0; k0 < k; k0 += kBlockK) {
    r_a.store(s_a, kPitchA);
    r_b.store(s_b, kPitchB);
    __syncthreads();
    if (k0 + kBlockK < k) load(k0 + kBlockK);
#pragma unroll
    for (int kk = 0; kk < kBlockK; ++kk) {
      const float4 a4 = *reinterpret_cast<const float4*>(s_a + kk * kPitchA + row);
      const float a[4] = {a4.x, a4.y, a4.z, a4.w};
#pragma unroll
      for (int part = 0; part < kBlockN / 64; ++part) {
        const float4 b4 = *reinterpret_cast<const float4*>(s_b + kk * kPitchB + part * 64 + col);
        const float b[4] = {b4.x, b4.y, b4.z, b4.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) r_acc[i][part * 4 + j] = fmaf(a[i], b[j], r_acc[i][part * 4 + j]);
        }
      }
    }
    __syncthreads();  // before the next k-tile or the results overwrite this one
  }

  const StagedTile<kBlockM, kBlockN, Shape::kThreads> tile{s_floats, place.row0, place.col0, place.rows, place.cols};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int part = 0; part < kBlockN / 64; ++part) {
      *reinterpret_cast<float4*>(&tile.at(row + i, part * 64 + col)) =
          make_float4(r_acc[i][part * 4], r_acc[i][part * 4 + 1], r_acc[i][part * 4 + 2], r_acc[i][part * 4 + 3]);
    }
  }
  __syncthreads();
  p.epilogue(tile);
}

}  // namespace persimmon_fast::cuda
