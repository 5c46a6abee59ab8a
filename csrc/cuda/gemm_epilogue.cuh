// What follows a matrix product: a block's fp32 results in shared memory, and the functors that consume them.
//
// An epilogue is a struct with the pointers it needs and
//
//   template <typename Tile> DEV void operator()(const Tile& tile) const
//
// which every thread of the block calls once, when the results are visible to all. It reads them by for_pieces, or by
// at() in whatever order it likes. A piece is 8 columns of a row; neighbouring lanes have neighbouring pieces, so
// 16-bit rows are read and written in full lines, and a row's segment of 64 or 128 columns lies in 8 or 16 neighbouring
// lanes of one warp: reduce it with reduce_lanes, exchange values through at() and __syncwarp().
//
// An epilogue with columns that nobody needs also has
//
//   DEV bool skips(int64_t col0) const                          whether a tile that starts here is not to be computed
//   DEV void skip(int64_t row0, int64_t col0, int rows) const   called instead, by every thread of the block
#pragma once

#include <cstdint>
#include <type_traits>

#include "csrc/cuda/convert.cuh"
#include "csrc/cuda/device.cuh"
#include "csrc/cuda/reduce.cuh"

namespace persimmon_fast::cuda {

constexpr int kPiece = 8;

// kCols: 16, 32, 64, 128 or 256. Values outside the matrix are zero.
template <int kRows_, int kCols_, int kThreads_>
struct StagedTile {
  static constexpr int kRows = kRows_;
  static constexpr int kCols = kCols_;
  static constexpr int kThreads = kThreads_;
  static constexpr int kLanesPerRow = kCols / kPiece;  // a row's pieces: neighbouring lanes of one warp

  float* s_values;  // [kRows, kCols], columns swizzled
  int64_t row0;     // the tile's place in the product
  int64_t col0;
  int rows;  // how much of the tile lies inside it: 1 .. kRows
  int cols;  // 1 .. kCols

  // Rows that differ modulo 4 start 8 banks apart: the accumulators of an mma, four rows of eight columns in half a
  // warp, are written without a conflict, and so are pieces of one row read. Eight aligned columns stay together.
  DEV float& at(int row, int col) const { return s_values[row * kCols + (col ^ (row % 4 * kPiece % kCols))]; }

  DEV void load_piece(int row, int col, float (&values)[kPiece]) const {
    // Lanes 4 to 7 read their halves in the other order: a quarter warp of 16-byte reads then touches every bank once.
    const int first = (col / kPiece / 4) % 2 * 4;
    const float4 a = *reinterpret_cast<const float4*>(&at(row, col + first));
    const float4 b = *reinterpret_cast<const float4*>(&at(row, col + (first ^ 4)));
    const float4 low = first == 0 ? a : b;
    const float4 high = first == 0 ? b : a;
    values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
    values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
  }

  // body(row, col, values, n) for the pieces of this thread; row and col count from the tile's corner, col is a
  // multiple of kPiece, the first n values lie inside the matrix. All lanes of a warp call body together, for pieces
  // outside the matrix with n = 0, so it may shuffle. col is the same in every call.
  template <typename Body>
  DEV void for_pieces(Body body) const {
    static_assert(kThreads % kLanesPerRow == 0 && kWarpSize % kLanesPerRow == 0);
    constexpr int kRowsPerPass = kThreads / kLanesPerRow;
    static_assert(kRows % kRowsPerPass == 0);
    const int col = threadIdx.x % kLanesPerRow * kPiece;
    const int columns_left = max(0, min(cols - col, kPiece));
#pragma unroll 4
    for (int pass = 0; pass < kRows / kRowsPerPass; ++pass) {
      const int row = pass * kRowsPerPass + threadIdx.x / kLanesPerRow;
      float values[kPiece];
      load_piece(row, col, values);
      body(row, col, values, row < rows ? columns_left : 0);
    }
  }
};

template <typename Epilogue, typename = void>
struct CanSkip : std::false_type {};
template <typename Epilogue>
struct CanSkip<Epilogue, std::void_t<decltype(&Epilogue::skips)>> : std::true_type {};

// Whether the block has nothing to compute for the tile at (row0, col0); its epilogue is done then.
template <typename Epilogue>
DEV bool skip_tile(const Epilogue& epilogue, int64_t row0, int64_t col0, int rows) {
  if constexpr (CanSkip<Epilogue>::value) {
    if (!epilogue.skips(col0)) return false;
    epilogue.skip(row0, col0, rows);
    return true;
  }
  return false;
}

// The n elements at p, zeros after them. vectorised: p is 16-byte aligned (looked at where n is kPiece).
template <typename scalar_t>
DEV void read_piece(const scalar_t* p, int n, bool vectorised, float (&values)[kPiece]) {
  if (vectorised && n == kPiece) {
    load_vector<true>(p, values);
  } else {
#pragma unroll
    for (int i = 0; i < kPiece; ++i) values[i] = i < n ? to_float(p[i]) : 0.0f;
  }
}

template <typename scalar_t>
DEV void write_piece(scalar_t* p, int n, bool vectorised, const float (&values)[kPiece]) {
  if (vectorised && n == kPiece) {
    store_vector<true>(p, values);
  } else {
#pragma unroll
    for (int i = 0; i < kPiece; ++i) {
      if (i < n) from_float(values[i], p[i]);
    }
  }
}

// Whether every piece of a matrix starts 16-byte aligned. A null matrix does.
template <typename scalar_t>
bool pieces_aligned(const scalar_t* matrix, int64_t row_stride) {
  return is_aligned(matrix) && row_stride % Chunk<scalar_t>::kSize == 0;
}

struct UnitScale {
  DEV float operator()(int64_t) const { return 1.0f; }
};

// out = product * scale(row) + bias + residual in fp32, rounded once.
template <typename scalar_t, typename RowScale = UnitScale>
struct BiasResidual {
  const scalar_t* bias;      // [n]; null: none
  const scalar_t* residual;  // [m, n], rows residual_row_stride elements apart; null: none
  scalar_t* out;             // [m, n], rows out_row_stride elements apart
  int64_t residual_row_stride;
  int64_t out_row_stride;
  bool vectorised;  // pieces_aligned of all three
  RowScale scale;

  bool finishes_on_sm90() const { return vectorised; }

  template <typename Tile>
  DEV void operator()(const Tile& tile) const {
    tile.for_pieces([&](int row, int col, const float (&values)[kPiece], int n) {
      if (n == 0) return;
      const int64_t row_idx = tile.row0 + row;
      const int64_t col_idx = tile.col0 + col;
      float r_bias[kPiece] = {};
      float r_residual[kPiece] = {};
      if (bias != nullptr) read_piece(bias + col_idx, n, vectorised, r_bias);
      if (residual != nullptr) {
        read_piece(residual + row_idx * residual_row_stride + col_idx, n, vectorised, r_residual);
      }
      const float row_scale = scale(row_idx);
      float sums[kPiece];
#pragma unroll
      for (int i = 0; i < kPiece; ++i) sums[i] = (values[i] * row_scale + r_bias[i]) + r_residual[i];
      write_piece(out + row_idx * out_row_stride + col_idx, n, vectorised, sums);
    });
  }
};

// bias [n], residual [m, n]: null for none; out [m, n].
template <typename scalar_t, typename RowScale = UnitScale>
BiasResidual<scalar_t, RowScale> bias_residual(const void* bias, const void* residual, int64_t residual_row_stride,
                                               void* out, int64_t out_row_stride, const RowScale& scale = {}) {
  BiasResidual<scalar_t, RowScale> epilogue{};
  epilogue.bias = static_cast<const scalar_t*>(bias);
  epilogue.residual = static_cast<const scalar_t*>(residual);
  epilogue.out = static_cast<scalar_t*>(out);
  epilogue.residual_row_stride = residual_row_stride;
  epilogue.out_row_stride = out_row_stride;
  epilogue.vectorised = is_aligned(bias) && pieces_aligned(epilogue.residual, residual_row_stride) &&
                        pieces_aligned(epilogue.out, out_row_stride);
  epilogue.scale = scale;
  return epilogue;
}

}  // namespace persimmon_fast::cuda
