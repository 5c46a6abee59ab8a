// gemm_sm90_kernel: epilogue(transform(A) B^T) for fp16 and bf16 on the tensor cores of sm_90a (wgmma, TMA).
//
// Tile      128 x 256, 192 or 128 (gemm_sm90_tile.h), k in steps of 64 through a ring of 4 or 6 stages. One block per
//           multiprocessor, which goes from tile to tile; two in a cluster, above each other: they share B
//
//             warpgroup 0   TMA: one thread fills the ring, ahead into the next tile while the others finish this one
//             warpgroup 1   rows  0 ..  63: wgmma m64 n(block_n) k16, sums in registers, then the epilogue
//             warpgroup 2   rows 64 .. 127: the same
//
//             stage   A: 128 rows x 64 of k     this block's rows, from its own copy
//                     B: boxes of 64 x 64       every other box from this block's copy, to both blocks of the cluster,
//                                               the rest from the other block's
//
//           full[stage]   the bytes of a stage have arrived. empty[stage]: all consumer warps of the cluster are done
//           with it, as each block's copies write into both
// Layout    128-byte swizzle of TMA, which wgmma and ldmatrix read without bank conflicts: piece c of row r at
//           c ^ (r % 8). K-major B: boxes of 64 rows of B. N-major B: boxes of 64 rows of k, read transposed by wgmma
// A in registers  With a transform, A goes through registers: ldmatrix, transform, wgmma with A from registers. One
//           stage ahead of the tensor cores, in two sets of registers
// Traffic   A once per column of tiles, B once per pair of row tiles, in an order in which what repeats is found in L2
// Bound     tensor cores, 2,048 multiplications per clock; 128 x 256 takes as many clocks of shared memory
// Resources 168 registers at launch, then 40 (TMA) and 232 by setmaxnreg. Shared memory 224 KB + 64 .. 96 bytes (192:
//           192 KB)
// Numerics  fp32 sums over k in ascending steps of 16, whatever the tile: the bits of a row depend on nothing but the
//           row and B. Tails are multiplied as zeros
// Requires  sm90_takes(): rows of A and B 16-byte aligned, n a multiple of 8
// Measured  on no GPU yet
// Source    persistent, warp-specialised pipeline with cluster multicast as in NVIDIA's CUTLASS 3.x
//           (github.com/NVIDIA/cutlass) and pranjalssh/fast.cu; written for this project
#pragma once

#include <atomic>
#include <type_traits>

#include "csrc/cuda/gemm_common.cuh"
#include "csrc/cuda/gemm_sm90_epilogue.cuh"
#include "csrc/cuda/gemm_sm90_tile.h"
#include "csrc/cuda/launch_sm90.cuh"
#include "csrc/cuda/ring_sm90.cuh"
#include "csrc/cuda/wgmma.cuh"

namespace persimmon_fast::cuda {

template <int kBlockN_>
struct Sm90Shape {
  static constexpr int kBlockM = kSm90BlockM;
  static constexpr int kBlockN = kBlockN_;
  static constexpr int kBlockK = 64;
  static constexpr int kCluster = kSm90Cluster;
  static constexpr int kStages = kBlockN == 128 ? 6 : 4;
  static constexpr int kConsumerWarps = 8;
  static constexpr int kThreads = 128 + kConsumerWarps * kWarpSize;
  static constexpr int kBoxBytes = 64 * kBlockK * 2;
  static constexpr int kBoxesB = kBlockN / 64;
  static constexpr int kBytesA = kBlockM * kBlockK * 2;
  static constexpr int kStageBytes = kBytesA + kBoxesB * kBoxBytes;
  static constexpr int kSlabBytes = 2 * kWarpSlabBytes;  // of a consumer warp, for the epilogue
  static constexpr size_t kSmemBytes = kStages * (kStageBytes + 2 * 8) + kConsumerWarps * kSlabBytes;
  static_assert(kSmemBytes <= kMaxSmemBytesSm90);
};

template <typename Transform, typename Epilogue>
struct GemmSm90Params {
  CUtensorMap a;
  CUtensorMap b;
  int m;
  int n;
  int k;
  Transform transform;
  Epilogue epilogue;
};

// A barrier of all threads of the cluster.
DEV void sync_cluster() {
  ptx::cluster_arrive();
  ptx::cluster_wait();
}

// What all threads of a block know.
template <typename Shape>
struct Sm90Block {
  uint32_t ring;   // stages
  uint32_t full;   // mbarriers
  uint32_t empty;  // mbarriers
  int rank;        // in the cluster

  DEV uint32_t stage(int i) const { return ring + i * Shape::kStageBytes; }
  DEV uint32_t full_barrier(int i) const { return full + 8 * i; }
  DEV uint32_t empty_barrier(int i) const { return empty + 8 * i; }
};

// body(row0, col0) for the tiles of this block, in an order in which those that run at the same time share operands.
template <typename Shape, typename Body>
DEV void for_tiles(int m, int n, int rank, Body body) {
  constexpr int kGroup = 16 / Shape::kCluster;  // 16 row tiles: a round of 128 blocks is about square
  const int tiles_m = static_cast<int>(num_tiles(m, Shape::kBlockM * Shape::kCluster));
  const int tiles_n = static_cast<int>(num_tiles(n, Shape::kBlockN));
  const int num_clusters = gridDim.x / Shape::kCluster;
#pragma unroll 1
  for (int index = blockIdx.x / Shape::kCluster; index < tiles_m * tiles_n; index += num_clusters) {
    const TileIndex tile = tile_of_block<kGroup>(index, tiles_m, tiles_n);
    body(static_cast<int>(tile.m * Shape::kCluster + rank) * Shape::kBlockM, static_cast<int>(tile.n) * Shape::kBlockN);
  }
}

// The thread that fills the ring.
template <typename Shape, BOrder kBOrder, typename Params>
DEV void produce(const Params& p, const Sm90Block<Shape>& block) {
  constexpr uint16_t kAllBlocks = (1 << Shape::kCluster) - 1;
  RingPosition<Shape::kStages> position;
  for_tiles<Shape>(p.m, p.n, block.rank, [&](int row0, int col0) {
#pragma unroll 1
    for (int k0 = 0; k0 < p.k; k0 += Shape::kBlockK) {
      const uint32_t full = block.full_barrier(position.stage);
      const uint32_t s_a = block.stage(position.stage);
      ptx::mbarrier_wait(block.empty_barrier(position.stage), position.parity ^ 1);
      ptx::mbarrier_arrive_expect_tx(full, Shape::kStageBytes);
      ptx::tma_load(s_a, &p.a, full, {k0, row0});
#pragma unroll
      for (int box = 0; box < Shape::kBoxesB; ++box) {
        const uint32_t s_box = s_a + Shape::kBytesA + box * Shape::kBoxBytes;
        const int n0 = col0 + box * 64;
        const int at[2] = {kBOrder == BOrder::kKMajor ? k0 : n0, kBOrder == BOrder::kKMajor ? n0 : k0};
        if (box % Shape::kCluster == block.rank) ptx::tma_load_multicast(s_box, &p.b, full, at, kAllBlocks);
      }
      position.advance();
    }
  });
}

// A consumer warpgroup's product of 64 rows.
template <typename scalar_t, typename Shape, BOrder kBOrder, typename Transform>
struct WarpgroupProduct {
  static constexpr bool kAInRegisters = !std::is_same_v<Transform, Unchanged>;
  static constexpr int kSteps = Shape::kBlockK / 16;
  static constexpr int kTransB = kBOrder == BOrder::kNMajor;

  const Sm90Block<Shape>& block;
  const Transform& transform;
  int warp;  // of the consumers
  int lane;
  RingPosition<Shape::kStages> position;
  float acc[Shape::kBlockN / 2];

  static constexpr int kStepBytesA = 16 * 2;
  static constexpr int kStepBytesB = kTransB ? 16 * 128 : 16 * 2;

  // A stage has been read by this warp: both blocks of the cluster may write into it. Between ldmatrix and the TMA that
  // overwrites what it read stands no proxy fence, as in CUTLASS's products with A from registers.
  DEV void release(int stage) const {
    if constexpr (kAInRegisters) __syncwarp();  // every lane's ldmatrix
    const uint32_t empty = block.empty_barrier(stage);
    if (lane < Shape::kCluster) ptx::mbarrier_arrive_cluster(empty, lane);
  }

  // Enqueues the products of the stage at `position`, with A as r_a where a transform changes it.
  DEV void multiply(bool accumulate, uint32_t (&r_a)[kSteps][4], const uint32_t (&factor)[2]) {
    const uint32_t s_stage = block.stage(uniform(position.stage));
    const uint32_t s_a = s_stage + uniform(warp / 4) * 64 * 128;  // of the warpgroup
    const uint64_t a = ptx::wgmma_operand(s_a);
    const uint64_t b = ptx::wgmma_operand(s_stage + Shape::kBytesA, Shape::kBoxBytes);
    ptx::mbarrier_wait(block.full_barrier(position.stage), position.parity);
    if constexpr (kAInRegisters) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        ptx::ldmatrix(r_a[step], s_a + swizzled<8>(warp % 4 * 16 + lane % 16, step * 2 + lane / 16));
        transform.apply(r_a[step], factor[0], factor[1]);
      }
      ptx::wgmma_registers(r_a);  // the fence is for them
    }
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const bool add = accumulate || step > 0;
      if constexpr (kAInRegisters) {
        ptx::wgmma_rs<kTransB>(acc, r_a[step], ptx::wgmma_operand_at(b, step * kStepBytesB), add, scalar_t{});
      } else {
        ptx::wgmma_ss<kTransB>(acc, ptx::wgmma_operand_at(a, step * kStepBytesA),
                               ptx::wgmma_operand_at(b, step * kStepBytesB), add, scalar_t{});
      }
    }
    ptx::wgmma_commit();
  }

  // The stages of a tile in which this warpgroup has no rows.
  DEV void skip(int k_tiles) {
#pragma unroll 1
    for (int k_tile = 0; k_tile < k_tiles; ++k_tile) {
      ptx::mbarrier_wait(block.full_barrier(position.stage), position.parity);
      release(position.stage);
      position.advance();
    }
  }

  // acc = the product of 64 rows; factor: of the two rows of this thread.
  DEV void run(int k_tiles, const uint32_t (&factor)[2]) {
    constexpr int kSets = kAInRegisters ? 2 : 1;  // the products of one stage run while the next is prepared
    uint32_t r_a[kSets][kSteps][4];
    const auto step = [&](int k_tile, int set) {
      multiply(k_tile > 0, r_a[set], factor);
      if (k_tile > 0) {
        ptx::wgmma_wait<1>();
        release(position.previous());
      }
      position.advance();
    };
#pragma unroll 1
    for (int k_tile = 0; k_tile < k_tiles; k_tile += 2) {
      step(k_tile, 0);
      if (k_tile + 1 < k_tiles) step(k_tile + 1, kSets - 1);
    }
    ptx::wgmma_wait<0>();
    ptx::wgmma_registers(acc);
    release(position.previous());
  }
};

template <typename scalar_t, typename Shape, BOrder kBOrder, typename Transform, typename Epilogue>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    gemm_sm90_kernel(const __grid_constant__ GemmSm90Params<Transform, Epilogue> p) {
#ifdef PF_SM90A
  SMEM_CARVER(smem);
  unsigned char* s_ring = smem.take<unsigned char>(Shape::kStages * Shape::kStageBytes, 1024);
  unsigned char* s_slabs = smem.take<unsigned char>(Shape::kConsumerWarps * Shape::kSlabBytes, 128);
  uint64_t* s_barriers = smem.take<uint64_t>(2 * Shape::kStages);
  const uint32_t barriers = ptx::smem_u32(s_barriers);
  const Sm90Block<Shape> block{ptx::smem_u32(s_ring), barriers, barriers + 8 * Shape::kStages,
                               static_cast<int>(blockIdx.x) % Shape::kCluster};
  if (threadIdx.x == 0) {
    ptx::prefetch_tensor_map(&p.a);
    ptx::prefetch_tensor_map(&p.b);
    for (int stage = 0; stage < Shape::kStages; ++stage) {
      ptx::mbarrier_init(block.full_barrier(stage), 1);
      ptx::mbarrier_init(block.empty_barrier(stage), Shape::kConsumerWarps * Shape::kCluster);
    }
    ptx::fence_mbarrier_init();
  }
  sync_cluster();  // before anyone waits, or copies into the other block

  if (threadIdx.x < 128) {
    ptx::decrease_registers<40>();
    if (threadIdx.x == 0) produce<Shape, kBOrder>(p, block);
  } else {
    ptx::increase_registers<232>();
    const int lane = threadIdx.x % kWarpSize;
    const int warp = threadIdx.x / kWarpSize - 4;
    WarpgroupProduct<scalar_t, Shape, kBOrder, Transform> product{block, p.transform, warp, lane, {}, {}};
    const WarpSlabs slabs{s_slabs + warp * Shape::kSlabBytes, lane};
    for_tiles<Shape>(p.m, p.n, block.rank, [&](int row0, int col0) {
      const int k_tiles = ceil_div(p.k, Shape::kBlockK);
      if (row0 + uniform(warp / 4) * 64 >= p.m) return product.skip(k_tiles);
      const int warp_row0 = row0 + warp * 16;
      const int rows = p.m - warp_row0;  // inside the product; maybe more than 16, or none
      const WarpTile<Shape::kBlockN> tile{product.acc, slabs, lane, warp_row0, col0, min(rows, 16), p.n - col0};
      uint32_t factor[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = half * 8 + lane / 4;
        factor[half] = row < rows ? p.transform.factor(warp_row0 + row) : 0;
      }
      if (rows > 0) begin(p.epilogue, tile);
      product.run(k_tiles, factor);
      if (rows > 0) finish(p.epilogue, tile);
      __syncwarp();  // the rows of the last slab have been read: the next tile may begin with it
    });
  }
  __syncwarp();    // the lane that filled the ring, and the others of its warp
  sync_cluster();  // nobody leaves while the other block copies into it
#else
  __trap();  // an error where the driver was made to run the PTX of another architecture
#endif
}

// Clusters that fit on the device at once: the grid of a kernel that goes from tile to tile.
template <typename Shape, typename Params>
cudaError_t max_clusters(void (*kernel)(Params), int num_multiprocessors, int& count) {
#ifdef PF_EMULATE
  static_cast<void>(kernel);
  count = num_multiprocessors / Shape::kCluster;
  return cudaSuccess;
#else
  // Kernels of one Shape take the same resources. Threads that ask at the same time write the same.
  constexpr int kMaxDevices = 64;
  static std::atomic<int> known[kMaxDevices];
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  count = device < kMaxDevices ? known[device].load(std::memory_order_relaxed) : 0;
  if (count != 0) return cudaSuccess;
  const unsigned blocks = static_cast<unsigned>(num_multiprocessors / Shape::kCluster * Shape::kCluster);
  const AttributedLaunch launch(kernel, blocks, Shape::kThreads, Shape::kSmemBytes, nullptr,
                                cluster_attribute(Shape::kCluster));
  error = launch.error != cudaSuccess ? launch.error : cudaOccupancyMaxActiveClusters(&count, kernel, &launch.config);
  if (error == cudaSuccess && count < 1) error = cudaErrorInvalidConfiguration;
  if (error == cudaSuccess && device < kMaxDevices) known[device].store(count, std::memory_order_relaxed);
  return error;
#endif
}

template <typename scalar_t, typename Shape, BOrder kBOrder, typename Transform, typename Epilogue>
cudaError_t launch_sm90_shape(const char* name, const GemmSm90Params<Transform, Epilogue>& params,
                              int num_multiprocessors, cudaStream_t stream) {
  const auto kernel = gemm_sm90_kernel<scalar_t, Shape, kBOrder, Transform, Epilogue>;
  int clusters = 0;
  const cudaError_t error = max_clusters<Shape>(kernel, num_multiprocessors, clusters);
  if (error != cudaSuccess) return error;
  const int64_t tiles = num_cluster_tiles(params.m, params.n, Shape::kBlockN);
  if (tiles < clusters) clusters = static_cast<int>(tiles);
  return launch_sm90(name, kernel, static_cast<unsigned>(clusters * Shape::kCluster), Shape::kThreads, Shape::kCluster,
                     Shape::kSmemBytes, stream, params);
}

inline TensorBox box_of_a(const GemmOperands& g) { return matrix_box(g.a, g.m, g.k, g.a_row_stride, kSm90BlockM); }
template <BOrder kBOrder>
TensorBox box_of_b(const GemmOperands& g) {
  const bool k_major = kBOrder == BOrder::kKMajor;
  return matrix_box(g.b, k_major ? g.n : g.k, k_major ? g.k : g.n, g.b_row_stride, 64);
}

// Whether launch_gemm_sm90 takes the product.
template <BOrder kBOrder, typename Epilogue>
bool sm90_takes(const GemmOperands& g, const Epilogue& epilogue) {
  return epilogue.finishes_on_sm90() && g.n % kPiece == 0 && g.k <= (1 << 30) && is_encodable(box_of_a(g)) &&
         is_encodable(box_of_b<kBOrder>(g)) && num_cluster_tiles(g.m, g.n, 128) < INT32_MAX;
}

// Enqueues epilogue(transform(A) B^T) where sm90_takes() it. kUnit: columns that a tile's width must be a
// multiple of.
template <typename scalar_t, BOrder kBOrder, int kUnit = 64, typename Epilogue, typename Transform = Unchanged>
cudaError_t launch_gemm_sm90(const char* name, const GemmOperands& g, const Epilogue& epilogue, int num_multiprocessors,
                             cudaStream_t stream, const Transform& transform = {}) {
  GemmSm90Params<Transform, Epilogue> params{};
  cudaError_t error = encode_tensor_map(box_of_a(g), params.a);
  if (error == cudaSuccess) error = encode_tensor_map(box_of_b<kBOrder>(g), params.b);
  if (error != cudaSuccess) return error;
  params.m = static_cast<int>(g.m);
  params.n = static_cast<int>(g.n);
  params.k = static_cast<int>(g.k);
  params.transform = transform;
  params.epilogue = epilogue;
  const auto launch = [&](auto shape) {
    return launch_sm90_shape<scalar_t, decltype(shape), kBOrder>(name, params, num_multiprocessors, stream);
  };
  switch (choose_block_n_sm90(g.m, g.n, num_multiprocessors, kUnit)) {
    case 256:
      return launch(Sm90Shape<256>{});
    case 192:
      if constexpr (192 % kUnit == 0) return launch(Sm90Shape<192>{});
      break;
    case 128:
      return launch(Sm90Shape<128>{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace persimmon_fast::cuda
