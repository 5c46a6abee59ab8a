// Which tile the matrix product for sm_90a uses: pure functions, tested without a GPU.
#pragma once

#include <cstdint>

#include "csrc/cuda/gemm_tile.h"

namespace persimmon_fast::cuda {

// A block computes 128 rows x block_n columns. The two blocks of a cluster lie above each other and share B; where
// there is one row tile alone, the second block only helps to fetch B.
constexpr int kSm90BlockM = 128;
constexpr int kSm90Cluster = 2;
constexpr int kSm90BlockN[] = {256, 192, 128};

// Clocks of a multiprocessor for 16 steps of k of a tile: the most of
//   tensor cores   2,048 multiplications per clock
//   shared memory  128 bytes per clock: each warpgroup reads its 64 rows of A and all of B, and TMA writes both once
//   L2             32 bytes per clock and multiprocessor, an assumption: A, and the block's share of B
// 256, 224 and 192 (docs/kernels/gemm_sm90.md).
constexpr int64_t step_clocks_sm90(int64_t block_n) {
  const int64_t row_bytes = 16 * 2;
  const int64_t tensor = kSm90BlockM * block_n * 16 / 2048;
  const int64_t shared = (2 * (kSm90BlockM + block_n) + block_n) * row_bytes / 128;
  const int64_t l2 = (kSm90BlockM + block_n / kSm90Cluster) * row_bytes / 32;
  const int64_t most = tensor > shared ? tensor : shared;
  return most > l2 ? most : l2;
}

// Tiles of a cluster: two blocks above each other.
constexpr int64_t num_cluster_tiles(int64_t m, int64_t n, int64_t block_n) {
  return num_tiles(m, kSm90BlockM * kSm90Cluster) * num_tiles(n, block_n);
}

// Columns of the tile for which the busiest cluster is predicted to take the fewest clocks; of equals the widest. The
// sum over k has the same order in all, so the choice changes no bit. unit: what the result must be a multiple of.
constexpr int choose_block_n_sm90(int64_t m, int64_t n, int num_multiprocessors, int unit = 64) {
  const int64_t clusters = num_multiprocessors / kSm90Cluster;
  int best = 0;
  int64_t best_clocks = 0;
  for (const int block_n : kSm90BlockN) {
    if (block_n % unit != 0) continue;
    const int64_t rounds = num_tiles(num_cluster_tiles(m, n, block_n), clusters > 0 ? clusters : 1);
    const int64_t clocks = rounds * step_clocks_sm90(block_n);
    if (best != 0 && clocks >= best_clocks) continue;
    best = block_n;
    best_clocks = clocks;
  }
  return best;
}

}  // namespace persimmon_fast::cuda
