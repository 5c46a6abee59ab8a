// What the products of sm90_gemm.cu and sm90_cluster.cu share: a ring of stages, each with a tile of a and of b.
#pragma once

#include "tests/emu/sm90_kernel.h"

constexpr int kStages = 3, kTileBytes = 64 * 64 * 2, kRingBytes = 2 * kStages * kTileBytes + 2 * kStages * 8;

struct Ring {
  uint32_t a, b, full, empty;
};

// By every thread; thread 128, which loads, makes the barriers. `releases` arrivals free a stage.
inline Ring take_ring(int releases) {
  SMEM_CARVER(smem);
  Ring ring{};
  ring.a = ptx::smem_u32(smem.take<char>(kStages * kTileBytes, 1024));
  ring.b = ptx::smem_u32(smem.take<char>(kStages * kTileBytes, 1024));
  ring.full = ptx::smem_u32(smem.take<uint64_t>(2 * kStages));
  ring.empty = ring.full + 8 * kStages;
  if (threadIdx.x == 128) {
    for (unsigned i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(ring.full + 8 * i, 1);
      ptx::mbarrier_init(ring.empty + 8 * i, releases);
    }
  }
  return ring;
}

// A warpgroup's sums, of which size x size lie in the matrix.
inline void store_sums(float* matrix, int64_t size, const float (&d)[32]) {
  const int lane = static_cast<int>(threadIdx.x % 32), row = static_cast<int>(threadIdx.x / 32) * 16 + lane / 4;
  for (int i = 0; i < 32; ++i) {
    const int r = row + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
    if (r < size && column < size) matrix[r * size + column] = d[i];
  }
}
