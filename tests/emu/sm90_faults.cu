// One kernel per mistake with the instructions of sm_90a, as faults.cu. Those of a whole pipeline: sm90_gemm.cu.
#include "tests/emu/sm90_kernel.h"

constexpr int kTileBytes = 64 * 64 * 2;

// Array 0: a matrix of two rows of 512; a box is 64 x 64, nearly all of it outside.
static void one_map(Sm90Args& args) { args.a = map_matrix(args.array<char>(0), 2, 512, 64); }

// ---- mbarrier ----

static uint32_t make_barrier(int count) {
  SMEM_CARVER(smem);
  const uint32_t barrier = ptx::smem_u32(smem.take<uint64_t>(1));
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, count);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  return barrier;
}

SM90_CASE(mbarrier_uninitialised, no_maps, 1, 32, 1, 16) {
  SMEM_CARVER(smem);
  const uint32_t barrier = ptx::smem_u32(smem.take<uint64_t>(2));
  if (threadIdx.x != 0) return;
  ptx::mbarrier_init(barrier, 1);
  ptx::mbarrier_arrive(barrier + (args.broken() ? 8 : 0));
}
SM90_CASE(mbarrier_overwritten, no_maps, 1, 32, 1, 16) {
  const uint32_t barrier = make_barrier(32);
  SMEM_CARVER(smem);
  if (args.broken() && threadIdx.x == 0) smem.take<uint64_t>(1)[0] = 7;
  ptx::mbarrier_arrive(barrier);
}
SM90_CASE(mbarrier_made_twice, no_maps, 1, 32, 1, 16) {
  const uint32_t barrier = make_barrier(1);
  if (args.broken() && threadIdx.x == 0) ptx::mbarrier_init(barrier, 1);
}
SM90_CASE(mbarrier_count, no_maps, 1, 32, 1, 16) { make_barrier(args.broken() ? 0 : 1); }
SM90_CASE(mbarrier_parity, no_maps, 1, 32, 1, 16) { ptx::mbarrier_wait(make_barrier(1), args.broken() ? 3 : 1); }

// ---- TMA ----

// Loads the box and reads it. numbers[0]: the mistake.
enum LoadMistake {
  kLoaded,
  kNoWait,
  kNoTensorMap,
  kWrongRank,
  kMisaligned,
  kBeyondTheArray,
  kTooFewBytes,
  kNeverWaited,
  kTwoLoadsToOnePlace,
  kNoFenceBefore,
};
SM90_CASE(tma_load, one_map, 1, 32, 1, 2 * kTileBytes + 16) {
  const int64_t mistake = args.broken() ? args.numbers[0] : int64_t{kLoaded};
  SMEM_CARVER(smem);
  uint32_t* s_box = smem.take<uint32_t>(2 * kTileBytes / 4, 1024);
  const uint32_t barrier = ptx::smem_u32(smem.take<uint64_t>(1));
  uint32_t box = ptx::smem_u32(s_box);
  if (threadIdx.x == 7) s_box[7] = 7;  // overwritten by the load
  if (mistake != kNoFenceBefore) ptx::fence_proxy_async();
  __syncthreads();
  if (mistake == kMisaligned) box += 128;
  if (mistake == kBeyondTheArray) box += kTileBytes + 1024;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::fence_mbarrier_init();
    if (mistake == kTwoLoadsToOnePlace) ptx::tma_load(box, &args.a, barrier, {0, 0});
    ptx::mbarrier_arrive_expect_tx(barrier, mistake == kTooFewBytes ? 16 : kTileBytes);
    if (mistake == kWrongRank) {
      ptx::tma_load(box, &args.a, barrier, {0, 0, 0});
    } else {
      ptx::tma_load(box, mistake == kNoTensorMap ? &args.b : &args.a, barrier, {0, 0});
    }
  }
  __syncthreads();
  if (mistake == kNeverWaited) return;
  if (mistake != kNoWait) ptx::mbarrier_wait(barrier, 0);
  args.array<uint32_t>(1)[threadIdx.x] = s_box[threadIdx.x];
  ptx::mbarrier_wait(barrier, 0);
}

// A tensor map of a row more than there is.
static void too_large_map(Sm90Args& args) { args.a = map_matrix(args.array<char>(0), args.broken() ? 3 : 2, 512, 64); }
SM90_CASE(tma_beyond_the_allocation, too_large_map, 1, 32, 1, kTileBytes + 16) {
  SMEM_CARVER(smem);
  const uint32_t box = ptx::smem_u32(smem.take<uint32_t>(kTileBytes / 4, 1024));
  const uint32_t barrier = ptx::smem_u32(smem.take<uint64_t>(1));
  if (threadIdx.x != 0) return;
  ptx::mbarrier_init(barrier, 1);
  ptx::fence_mbarrier_init();
  ptx::mbarrier_arrive_expect_tx(barrier, kTileBytes);
  ptx::tma_load(box, &args.a, barrier, {0, 0});
  ptx::mbarrier_wait(barrier, 0);
}

// Stores the box and uses its shared memory again. numbers[0]: the mistake.
enum StoreMistake { kStored, kNoProxyFence, kOverwritten, kNotWaited, kNoCommit, kReadTooEarly };
SM90_CASE(tma_store, one_map, 1, 32, 1, kTileBytes) {
  const int64_t mistake = args.broken() ? args.numbers[0] : int64_t{kStored};
  SMEM_CARVER(smem);
  uint32_t* s_box = smem.take<uint32_t>(kTileBytes / 4, 1024);
  const unsigned thread = threadIdx.x;
  s_box[thread] = thread;  // row 0 is not swizzled
  if (mistake != kNoProxyFence) ptx::fence_proxy_async();
  __syncthreads();
  if (thread != 0) return;
  ptx::tma_store(&args.a, ptx::smem_u32(s_box), {0, 0});
  if (mistake != kNoCommit) ptx::tma_store_commit();
  if (mistake == kNotWaited) return;
  if (mistake == kOverwritten) s_box[0] = 77;
  ptx::tma_store_wait_read<0>();
  s_box[0] = 78;
  if (mistake != kReadTooEarly) ptx::tma_store_wait<0>();
  args.array<uint32_t>(1)[0] = args.array<uint32_t>(0)[0];
}

// ---- wgmma ----

// A product of zeros, and of registers. numbers[0]: the mistake.
enum ProductMistake { kMultiplied, kMissingProxyFence, kDiffers, kOutOfBounds, kRegistersReplaced };
SM90_CASE(product, no_maps, 1, 128, 1, 2 * kTileBytes) {
  const int64_t mistake = args.broken() ? args.numbers[0] : int64_t{kMultiplied};
  SMEM_CARVER(smem);
  uint32_t* s_tiles = smem.take<uint32_t>(2 * kTileBytes / 4, 1024);
  for (unsigned i = threadIdx.x; i < 2 * kTileBytes / 4; i += 128) s_tiles[i] = 0x3c003c00;  // ones of fp16
  if (mistake != kMissingProxyFence) ptx::fence_proxy_async();
  __syncthreads();
  float d[32];
  const uint32_t at = ptx::smem_u32(s_tiles);
  const uint32_t step = mistake == kDiffers && threadIdx.x == 77 ? 32 : 0;
  const uint32_t b = at + (mistake == kOutOfBounds ? kTileBytes + 1024 : kTileBytes);
  ptx::wgmma_fence();
  ptx::wgmma_ss<0>(d, ptx::wgmma_operand(at + step), ptx::wgmma_operand(b), false, __half{});
  uint32_t a[4] = {0x3c003c00, 0x3c003c00, 0x3c003c00, 0x3c003c00};
  ptx::wgmma_rs<0>(d, a, ptx::wgmma_operand(b), true, __half{});
  ptx::wgmma_commit();
  if (mistake == kRegistersReplaced) a[0] = 0;
  ptx::wgmma_wait<0>();
  args.array<float>(0)[threadIdx.x] = d[0];  // 32
}

// ---- registers ----

enum RegisterMistake { kMoved, kTooMany, kUpIsDown, kOneWarp, kTwoNumbers, kNoMultiple };
SM90_CASE(registers, no_maps, 1, 384, 1, 0) {
  const int64_t mistake = args.broken() ? args.numbers[0] : int64_t{kMoved};
  const unsigned warpgroup = threadIdx.x / 128;
  if (warpgroup == 2) {
    if (mistake == kOneWarp && threadIdx.x >= 288) return;
    if (mistake == kUpIsDown) {
      ptx::decrease_registers<232>();
    } else if (mistake == kNoMultiple) {
      ptx::decrease_registers<36>();
    } else if (mistake == kTwoNumbers && threadIdx.x >= 352) {
      ptx::decrease_registers<40>();
    } else {
      ptx::decrease_registers<32>();
    }
  } else if (mistake == kTooMany) {
    ptx::increase_registers<240>();  // 2 x 240 + 32 are more than 3 x 168
  } else if (mistake != kOneWarp) {
    ptx::increase_registers<232>();
  }
}

// ---- launches ----

SM90_CASE(cluster_too_large, no_maps, 9, 32, args.broken() ? 9 : 3, 0) {}
SM90_CASE(cluster_not_whole, no_maps, 3, 32, args.broken() ? 2 : 3, 0) {}
SM90_CASE(shared_too_large_for_sm90, no_maps, 1, 32, 1, 227 * 1024 + (args.broken() ? 16 : 0)) {}
static const Registration wrong_architecture_registration("wrong_architecture", [](const Args& args) {
  struct Architecture {
    explicit Architecture(int architecture) { emu::set_architecture(architecture); }
    ~Architecture() { emu::set_architecture(90); }
  };
  const Architecture architecture(args.broken() ? 80 : 90);
  emu::launch_cluster_named("wrong_architecture", cluster_not_whole, 1, 32, 1, 0, Sm90Args{});
});
SM90_CASE(cluster_wait_without_arrive, no_maps, 2, 32, 2, 0) {
  if (!args.broken()) ptx::cluster_arrive();
  ptx::cluster_wait();
}
