// What the tensor-core and the fp32 matrix product share: operands, launch parameters, the place of a block's tile.
#pragma once

#include <cstdint>

#include "csrc/cuda/device.cuh"
#include "csrc/cuda/dispatch.h"
#include "csrc/cuda/gemm_epilogue.cuh"
#include "csrc/cuda/gemm_tile.h"

namespace persimmon_fast::cuda {

// How B lies in memory.
enum class BOrder {
  kKMajor,  // [n, k]: rows are output features, as nn.Linear keeps weights
  kNMajor,  // [k, n]: rows are input features, as the MLP's down projection lies
};

struct GemmOperands {
  const void* a;  // [m, k], rows a_row_stride elements apart
  const void* b;  // [n, k] or [k, n] (BOrder), rows b_row_stride elements apart
  int64_t m;
  int64_t n;
  int64_t k;  // > 0
  int64_t a_row_stride;
  int64_t b_row_stride;
};

// A transform changes A in registers, between shared memory and the multiplication:
//   factor(row)          a value for the row, kept in a register by each thread that holds a part of it
//   apply(a, low, high)  changes one fragment of 16 x 16; a[0], a[2] belong to the row of factor `low`, a[1], a[3] to
//                        that of `high`; two 16-bit elements in each
struct Unchanged {
  DEV uint32_t factor(int64_t) const { return 0; }
  DEV void apply(uint32_t (&)[4], uint32_t, uint32_t) const {}
};

template <typename Transform, typename Epilogue>
struct GemmKernelParams {
  GemmOperands operands;
  Transform transform;
  Epilogue epilogue;
};

// Byte offset of a 16-byte chunk in a tile with rows of kChunks chunks.
template <int kChunks>
DEV int swizzled(int row, int chunk) {
  static_assert(kChunks == 4 || kChunks == 8 || kChunks == 16);
  return (row * kChunks + (chunk ^ (kChunks == 4 ? row / 2 % 4 : row % 8))) * 16;
}

struct TilePlace {
  int64_t row0;
  int64_t col0;
  int rows;  // of the tile, inside the product
  int cols;
};

template <int kBlockM, int kBlockN>
DEV TilePlace tile_place(const GemmOperands& g) {
  const TileIndex tile = tile_of_block(int64_t{blockIdx.x}, num_tiles(g.m, kBlockM), num_tiles(g.n, kBlockN));
  TilePlace place;
  place.row0 = tile.m * kBlockM;
  place.col0 = tile.n * kBlockN;
  place.rows = static_cast<int>(min(g.m - place.row0, int64_t{kBlockM}));
  place.cols = static_cast<int>(min(g.n - place.col0, int64_t{kBlockN}));
  return place;
}

// One block per tile of the product, which is not empty.
template <typename Shape, typename Params>
cudaError_t launch_tiles(const char* name, void (*kernel)(Params), size_t smem_bytes, cudaStream_t stream,
                         const Params& params) {
  const GemmOperands& g = params.operands;
  const int64_t num_blocks = num_tiles(g.m, Shape::kBlockM) * num_tiles(g.n, Shape::kBlockN);
  if (num_blocks > INT32_MAX || g.k > (1 << 30)) return kTooLarge;  // 32-bit indices inside k
  return launch(name, kernel, static_cast<unsigned>(num_blocks), Shape::kThreads, smem_bytes, stream, params);
}

}  // namespace persimmon_fast::cuda
