// Which output tile a matrix product uses: pure functions, tested without a GPU.
#pragma once

#include <cstdint>

#include "csrc/common/ceil_div.h"

namespace persimmon_fast::cuda {

// Large: 128 x 128. Small: 64 rows x 64 columns, or x 128 where an epilogue needs whole heads of 128.
enum class GemmTile { kLarge, kSmall };

constexpr int64_t num_tiles(int64_t size, int64_t tile) { return ceil_div(size, tile); }

// Cycles of an A100 multiprocessor for 16 steps of k of a tile: 1,024 multiplications each, or, where that takes more,
// 128 bytes of shared memory each (docs/kernels/gemm.md). 256 for the large tile, 96 and 144 for the small ones.
constexpr int64_t step_cycles(int64_t block_m, int64_t block_n) {
  const int64_t multiply = block_m * block_n * 16 / 1024;
  // Rows of 32 bytes, each read by 2 of the 4 warps and written by a copy.
  const int64_t shared = (block_m + block_n) * (2 * 32 + 32) / 128;
  return multiply > shared ? multiply : shared;
}

// The tile for which the busiest multiprocessor is predicted to take less time. The sum over k has the same order in
// both, so the choice changes no bit.
constexpr GemmTile choose_gemm_tile(int64_t m, int64_t n, int num_multiprocessors, int small_block_n = 64) {
  const int64_t large = num_tiles(num_tiles(m, 128) * num_tiles(n, 128), num_multiprocessors);
  const int64_t small = num_tiles(num_tiles(m, 64) * num_tiles(n, small_block_n), num_multiprocessors);
  return large * step_cycles(128, 128) <= small * step_cycles(64, small_block_n) ? GemmTile::kLarge : GemmTile::kSmall;
}

struct TileIndex {
  int64_t m, n;
};

// Which tile block number `index` computes. Blocks that run at the same time should share operands in L2: they go down
// a group of kGroup row tiles before they go to the next column tile.
//
//   kGroup = 2:   0 2 4 6      rows of A: one group at a time
//                 1 3 5 7      columns of B: once per group
//                 8 . .
//
// 16: a wave of 216 (A100) or 264 (H100) large tiles is then about square.
template <int kGroup = 16, typename Index>
constexpr TileIndex tile_of_block(Index index, Index tiles_m, Index tiles_n) {
  const Index group = index / (kGroup * tiles_n);
  const Index in_group = index % (kGroup * tiles_n);
  const Index first = group * kGroup;
  const Index height = tiles_m - first < kGroup ? tiles_m - first : kGroup;
  return {first + in_group % height, in_group / height};
}

}  // namespace persimmon_fast::cuda
