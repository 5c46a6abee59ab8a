// A small product as kernels for Hopper compute it, correct and with each mistake that must be found: a warpgroup loads
// by TMA, another multiplies by wgmma, stages in a ring of mbarriers.
#include "tests/emu/sm90_ring.h"

enum Mistake {
  kNone,
  kNoWgmmaFence,
  kTooFewBytes,
  kTooManyBytes,
  kWrongParity,
  kEarlyRelease,
  kNoRelease,
  kFirstLapNotWaited,
  kNoWaitForEmpty,
  kNoBarrierAfterInit,
  kNoFenceAfterInit,
  kNoCommit,
  kLastGroupNotWaited,
  kOneWarpDoesNotWait,
  kEarlyRead,
};

// Arrays: 0: a [64][k]; 1: b [64][k]; 2: d [64][64] = a b^T. Numbers: 0: the mistake; 1: rows of a and b; 2: k.
static void gemm_maps(Sm90Args& args) {
  const int64_t rows = args.numbers[1] != 0 ? args.numbers[1] : 2, k = args.numbers[2] != 0 ? args.numbers[2] : 512;
  args.numbers[1] = rows;
  args.numbers[2] = k;
  args.a = map_matrix(args.array<char>(0), rows, k, 64);
  args.b = map_matrix(args.array<char>(1), rows, k, 64);
}

static void produce(const Sm90Args& args, const Ring& ring, int num_tiles, int64_t mistake) {
  for (int tile = 0; tile < num_tiles; ++tile) {
    const int stage = tile % kStages;
    const uint32_t at = static_cast<uint32_t>(stage) * kTileBytes, full = ring.full + 8 * stage;
    const int parity = tile / kStages % 2;
    if (mistake != kNoWaitForEmpty) ptx::mbarrier_wait(ring.empty + 8 * stage, parity ^ 1);
    const int wrong_bytes = mistake == kTooFewBytes ? -kTileBytes : mistake == kTooManyBytes ? 16 : 0;
    ptx::mbarrier_arrive_expect_tx(full, 2 * kTileBytes + wrong_bytes);
    ptx::tma_load(ring.a + at, &args.a, full, {tile * 64, 0});
    ptx::tma_load(ring.b + at, &args.b, full, {tile * 64, 0});
  }
}

static void consume(const Sm90Args& args, const Ring& ring, int num_tiles, int64_t mistake) {
  float d[32] = {};
  for (int tile = 0; tile < num_tiles; ++tile) {
    const int stage = tile % kStages, parity = tile / kStages % 2;
    const uint32_t at = static_cast<uint32_t>(stage) * kTileBytes;
    const bool waits = !(mistake == kFirstLapNotWaited && tile < kStages) &&
                       !(mistake == kOneWarpDoesNotWait && threadIdx.x / 32 == 1);
    if (waits) ptx::mbarrier_wait(ring.full + 8 * stage, mistake == kWrongParity ? 0 : parity);
    if (mistake != kNoWgmmaFence) ptx::wgmma_fence();
    for (unsigned k = 0; k < 4; ++k) {
      ptx::wgmma_ss<0>(d, ptx::wgmma_operand(ring.a + at + k * 32), ptx::wgmma_operand(ring.b + at + k * 32),
                       tile + k > 0, __nv_bfloat16{});
    }
    if (mistake != kNoCommit) ptx::wgmma_commit();
    if (mistake == kEarlyRelease && threadIdx.x == 0) ptx::mbarrier_arrive(ring.empty + 8 * stage);
    if (mistake == kEarlyRead) args.array<float>(3)[threadIdx.x] = d[0];
    if (mistake != kLastGroupNotWaited || tile + 1 < num_tiles) ptx::wgmma_wait<0>();
    if (mistake != kEarlyRelease && mistake != kNoRelease && threadIdx.x == 0) {
      ptx::mbarrier_arrive(ring.empty + 8 * stage);
    }
  }
  store_sums(args.array<float>(2), args.numbers[1], d);
}

SM90_CASE(gemm, gemm_maps, 1, 256, 1, kRingBytes) {
  const int64_t mistake = args.broken() ? args.numbers[0] : int64_t{kNone};
  const Ring ring = take_ring(1);
  if (threadIdx.x == 128 && mistake != kNoFenceAfterInit) ptx::fence_mbarrier_init();
  if (mistake != kNoBarrierAfterInit) __syncthreads();
  const int num_tiles = static_cast<int>((args.numbers[2] + 63) / 64);
  if (threadIdx.x >= 128) {
    ptx::decrease_registers<40>();
    if (threadIdx.x == 128) produce(args, ring, num_tiles, mistake);
  } else {
    ptx::increase_registers<248>();
    consume(args, ring, num_tiles, mistake);
  }
}
