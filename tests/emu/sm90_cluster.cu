// Clusters, correct and with each mistake that must be found.
#include "tests/emu/sm90_ring.h"

// ---- distributed shared memory ----

enum ExchangeMistake {
  kExchanged,
  kNoFirstBarrier,
  kNoLastBarrier,
  kWrongRank,
  kUnmappedAddress,
  kArriveTwice,
  kWritesAgain
};

// 0: out[block][thread] = what the thread wrote that follows in the next block of the cluster, and what that one stored
// into this block: thread of a block b: 100 b + thread, and 1000 more.
SM90_CASE(cluster_exchange, no_maps, 4, 64, 2, 512) {
  const int64_t mistake = args.broken() ? args.numbers[0] : int64_t{kExchanged};
  SMEM_CARVER(smem);
  int* s_values = smem.take<int>(64);
  int* s_given = smem.take<int>(64);
  const int thread = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x);
  const int other = mistake == kWrongRank ? 2 : 1 - ptx::cluster_rank();
  s_values[thread] = 100 * block + thread;
  if (mistake != kNoFirstBarrier) {
    ptx::cluster_arrive();
    if (mistake == kArriveTwice) ptx::cluster_arrive();
    ptx::cluster_wait();
  }
  const uint32_t neighbour = ptx::smem_u32(s_values + (thread + 1) % 64);
  const uint32_t from = mistake == kUnmappedAddress ? neighbour : ptx::map_shared_rank(neighbour, other);
  const int value = ptx::ld_shared_cluster<int>(from);
  ptx::st_shared_cluster(ptx::map_shared_rank(ptx::smem_u32(s_given + thread), other), 1000 + 100 * block + thread);
  if (mistake == kWritesAgain) s_values[thread] = 0;  // before the other block has read it
  if (mistake != kNoLastBarrier) {
    ptx::cluster_arrive();
    ptx::cluster_wait();
    args.array<int>(0)[block * 128 + 64 + thread] = s_given[thread];
  }
  args.array<int>(0)[block * 128 + thread] = value;
}

// ---- a product whose blocks share b ----

enum Mistake { kNone, kNoClusterBarrier, kReleasesOwnBlock, kWaitsForOwnBlock, kEndsEarly, kWrongMask };

// Arrays: 0: a [2 rows][k]; 1: b [rows][k]; 2: d [2 rows][rows] = a b^T. Numbers: 0: the mistake; 1: rows, up to 64; 2:
// k.
static void multicast_maps(Sm90Args& args) {
  const int64_t rows = args.numbers[1] != 0 ? args.numbers[1] : 1, k = args.numbers[2] != 0 ? args.numbers[2] : 512;
  args.numbers[1] = rows;
  args.numbers[2] = k;
  args.a = map_matrix(args.array<char>(0), 2 * rows, k, 64);
  args.b = map_matrix(args.array<char>(1), rows, k, 32);
}

// Each of the two blocks loads its own 64 rows of a, and half of b for both.
static void produce(const Sm90Args& args, const Ring& ring, int num_tiles, int64_t mistake) {
  const int rank = ptx::cluster_rank();
  const auto half = static_cast<uint32_t>(rank) * kTileBytes / 2;
  for (int tile = 0; tile < num_tiles; ++tile) {
    const int stage = tile % kStages;
    const uint32_t at = static_cast<uint32_t>(stage) * kTileBytes, full = ring.full + 8 * stage;
    ptx::mbarrier_wait(ring.empty + 8 * stage, tile / kStages % 2 ^ 1);
    ptx::mbarrier_arrive_expect_tx(full, 2 * kTileBytes);
    ptx::tma_load(ring.a + at, &args.a, full, {tile * 64, rank * static_cast<int>(args.numbers[1])});
    const uint16_t mask = mistake == kWrongMask ? 1 : 3;
    ptx::tma_load_multicast(ring.b + at + half, &args.b, full, {tile * 64, rank * 32}, mask);
  }
}

static void consume(const Sm90Args& args, const Ring& ring, int num_tiles, int64_t mistake) {
  float d[32];
  const int thread = static_cast<int>(threadIdx.x);
  for (int tile = 0; tile < num_tiles; ++tile) {
    const int stage = tile % kStages;
    const uint32_t at = static_cast<uint32_t>(stage) * kTileBytes;
    ptx::mbarrier_wait(ring.full + 8 * stage, tile / kStages % 2);
    ptx::wgmma_fence();
    for (unsigned k = 0; k < 4; ++k) {
      ptx::wgmma_ss<0>(d, ptx::wgmma_operand(ring.a + at + k * 32), ptx::wgmma_operand(ring.b + at + k * 32),
                       tile + k > 0, __nv_bfloat16{});
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    if (thread >= 2) continue;  // the other block overwrites this one's half of b, too
    if (mistake == kReleasesOwnBlock || mistake == kWaitsForOwnBlock) {
      if (thread == 0) ptx::mbarrier_arrive(ring.empty + 8 * stage);
    } else {
      ptx::mbarrier_arrive_cluster(ring.empty + 8 * stage, thread);
    }
  }
  const int64_t rows = args.numbers[1];
  store_sums(args.array<float>(2) + ptx::cluster_rank() * rows * rows, rows, d);
}

SM90_CASE(cluster_gemm, multicast_maps, 2, 256, 2, kRingBytes) {
  const int64_t mistake = args.broken() ? args.numbers[0] : int64_t{kNone};
  const Ring ring = take_ring(mistake == kWaitsForOwnBlock ? 1 : 2);
  if (threadIdx.x == 128) ptx::fence_mbarrier_init();
  __syncthreads();
  if (mistake != kNoClusterBarrier) {
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }
  const int num_tiles = static_cast<int>((args.numbers[2] + 63) / 64);
  if (threadIdx.x < 128) {
    consume(args, ring, num_tiles, mistake);
  } else if (threadIdx.x == 128) {
    produce(args, ring, num_tiles, mistake);
  }
  if (mistake != kEndsEarly) {  // the other block arrives here
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }
}
