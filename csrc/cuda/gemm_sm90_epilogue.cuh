// What follows a matrix product on sm_90a: a warp's 16 rows of fp32 sums in registers, and how they become 16-bit rows.
//
// An epilogue is a struct with the pointers it needs and a function
//
//   template <int kCols> DEV void finish(const Epilogue& epilogue, const WarpTile<kCols>& tile)
//
// that every warp of the consumers calls on its own; also, if it likes, begin(epilogue, tile), called before the
// product. The structs are those of gemm_epilogue.cuh: one set of parameters, two places where the sums lie. An
// epilogue that can be finished here has
//
//   bool finishes_on_sm90() const   whether its pointers allow it: vectors of 16 bytes
//
// 16 rows x 64 columns of results become a slab: 16-bit, in shared memory, from where whole lines of 128 bytes go out.
#pragma once

#include <cstdint>
#include <type_traits>

#include "csrc/cuda/convert.cuh"
#include "csrc/cuda/gemm_epilogue.cuh"
#include "csrc/cuda/ptx_sm90.cuh"

namespace persimmon_fast::cuda {

template <typename Epilogue, typename = void>
struct CanFinishOnSm90 : std::false_type {};
template <typename Epilogue>
struct CanFinishOnSm90<Epilogue, std::void_t<decltype(&Epilogue::finishes_on_sm90)>> : std::true_type {};

constexpr int kSlabCols = 64;
constexpr int kSlabRows = 16;
constexpr int kWarpSlabBytes = kSlabRows * kSlabCols * 2;

// 16 rows x 64 columns of 16 bits in shared memory; 16-byte piece p of row r lies at p ^ (r % 8). s_bytes: a multiple
// of 128. Addresses are written so that what changes from one to the next is a constant.
struct WarpSlab {
  unsigned char* s_bytes;
  int lane;

  // Of 16 columns from 16 * block on: where this lane's row of an ldmatrix or stmatrix lies. Registers 0, 1: rows 0 ..
  // 7 and 8 .. 15 of the first 8 columns; 2, 3: of the others: the order of an accumulator.
  DEV uint32_t matrix_row(int block) const {
    const int first = lane % 16 * 128 + (lane / 16 ^ lane % 8) * 16;
    return (ptx::smem_u32(s_bytes) + first) ^ block * 32;
  }

  // The pieces of this lane, one in each pass: piece lane % 8 of row 4 * pass + lane / 8.
  static constexpr int kPasses = kSlabRows / 4;
  DEV uint4& piece(int pass) const {
    const int first = lane / 8 * 128 + (lane % 8 ^ lane / 8) * 16;
    return *reinterpret_cast<uint4*>(s_bytes + ((first ^ pass % 2 * 64) + pass * 512));
  }
  DEV int row(int pass) const { return pass * 4 + lane / 8; }
  DEV int column() const { return lane % 8 * kPiece; }
};

// Two slabs in turn: while the rows of one go out, the next is written, and one __syncwarp() per slab is enough.
struct WarpSlabs {
  unsigned char* s_bytes;
  int lane;

  DEV WarpSlab operator[](int i) const { return {s_bytes + i % 2 * kWarpSlabBytes, lane}; }
};

// Two neighbouring 16-bit elements, and 0 where there is no array.
template <typename scalar_t>
DEV float2 load_pair(const scalar_t* p, bool exists = true) {
  return exists ? unpack2(*reinterpret_cast<const uint32_t*>(p), scalar_t{}) : make_float2(0.0f, 0.0f);
}

// What a warp holds of a tile: acc[4 j + 2 h + e] is row 8 h + lane / 4, column 8 j + 2 (lane % 4) + e.
template <int kCols_>
struct WarpTile {
  static constexpr int kCols = kCols_;
  static constexpr int kSlabs = kCols / kSlabCols;
  static constexpr int kSlabBlocks = kSlabCols / 8;

  float (&acc)[kCols / 2];
  WarpSlabs slabs;
  int lane;
  int row0;  // the place of the warp's rows in the product
  int col0;
  int rows;  // that lie inside it: 1 .. 16
  int cols;  // that lie inside it, a multiple of 8; maybe more than kCols

  // Where this lane's two columns of block 0 begin; those of block j lie 8 j further.
  DEV int first_column() const { return lane % 4 * 2; }

  // Rounds the columns of slab `index` and writes them out: row(pass) is where column 0 of the slab goes in the row
  // that this lane writes in that pass, null: nowhere. Only what lies inside the product is written.
  template <typename scalar_t, typename Row>
  DEV void store_slab(int index, Row row) const {
    const WarpSlab slab = slabs[index];
#pragma unroll
    for (int block = 0; block < kSlabBlocks / 2; ++block) {
      uint32_t r_pairs[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int first = (index * kSlabBlocks + block * 2 + i / 2) * 4 + i % 2 * 2;
        r_pairs[i] = pack2(acc[first], acc[first + 1], scalar_t{});
      }
      ptx::stmatrix(slab.matrix_row(block), r_pairs);
    }
    __syncwarp();
    const bool column_exists = index * kSlabCols + slab.column() < cols;
#pragma unroll
    for (int pass = 0; pass < WarpSlab::kPasses; ++pass) {
      scalar_t* g_row = row(pass);
      if (g_row != nullptr && slab.row(pass) < rows && column_exists) {
        *reinterpret_cast<uint4*>(g_row + slab.column()) = slab.piece(pass);
      }
    }
  }

  // The same into rows of a matrix, `stride` elements apart.
  template <typename scalar_t>
  DEV void store_slab(int index, scalar_t* matrix, int64_t stride) const {
    scalar_t* g_first = matrix + (row0 + lane / 8) * stride + col0;
    store_slab<scalar_t>(index, [&](int pass) { return g_first + pass * 4 * stride + index * kSlabCols; });
  }
};

template <typename Epilogue, int kCols>
DEV void begin(const Epilogue&, const WarpTile<kCols>&) {}

// The residual of slab `index` on its way to shared memory, as a group of cp.async.
template <typename scalar_t, typename RowScale, int kCols>
DEV void fetch_residual(const BiasResidual<scalar_t, RowScale>& epilogue, const WarpTile<kCols>& tile, int index) {
  if (index < WarpTile<kCols>::kSlabs && epilogue.residual != nullptr) {
    const WarpSlab slab = tile.slabs[index];
    const int64_t stride = epilogue.residual_row_stride;
    const scalar_t* g_piece =
        epilogue.residual + (tile.row0 + slab.row(0)) * stride + tile.col0 + index * kSlabCols + slab.column();
    const bool column_exists = index * kSlabCols + slab.column() < tile.cols;
#pragma unroll
    for (int pass = 0; pass < WarpSlab::kPasses; ++pass) {
      const bool exists = column_exists && slab.row(pass) < tile.rows;
      ptx::cp_async16(ptx::smem_u32(&slab.piece(pass)), g_piece + pass * 4 * stride, exists ? 16 : 0);
    }
  }
  ptx::cp_async_commit();  // empty groups keep the count
}

// Two slabs of the residual have the time of the product to arrive, the others that of a slab.
template <typename scalar_t, typename RowScale, int kCols>
DEV void begin(const BiasResidual<scalar_t, RowScale>& epilogue, const WarpTile<kCols>& tile) {
  fetch_residual(epilogue, tile, 0);
  fetch_residual(epilogue, tile, 1);
}

// out = product * scale(row) + bias + residual, as BiasResidual does it elsewhere.
template <typename scalar_t, typename RowScale, int kCols>
DEV void finish(const BiasResidual<scalar_t, RowScale>& epilogue, const WarpTile<kCols>& tile) {
  using Tile = WarpTile<kCols>;
  const bool has_bias = epilogue.bias != nullptr;
  const bool has_residual = epilogue.residual != nullptr;
  const scalar_t* g_bias = has_bias ? epilogue.bias + tile.col0 + tile.first_column() : nullptr;
  float row_scale[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) row_scale[h] = epilogue.scale(tile.row0 + min(h * 8 + tile.lane / 4, tile.rows - 1));
#pragma unroll
  for (int index = 0; index < Tile::kSlabs; ++index) {
    if (index * kSlabCols >= tile.cols) break;
    const WarpSlab slab = tile.slabs[index];
    ptx::cp_async_wait<1>();
    __syncwarp();
#pragma unroll
    for (int block = 0; block < Tile::kSlabBlocks / 2; ++block) {
      uint32_t r_residual[4] = {};
      if (has_residual) ptx::ldmatrix(r_residual, slab.matrix_row(block));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int j = index * Tile::kSlabBlocks + block * 2 + i;
        const float2 bias = load_pair(g_bias + j * 8, has_bias && j * 8 < tile.cols);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float2 residual = unpack2(r_residual[2 * i + h], scalar_t{});
          float* values = &tile.acc[4 * j + 2 * h];
          values[0] = (values[0] * row_scale[h] + bias.x) + residual.x;
          values[1] = (values[1] * row_scale[h] + bias.y) + residual.y;
        }
      }
    }
    tile.template store_slab<scalar_t>(index, epilogue.out, epilogue.out_row_stride);
    fetch_residual(epilogue, tile, index + 2);  // this lane has read what it overwrites
  }
  ptx::cp_async_wait<0>();
}

}  // namespace persimmon_fast::cuda
