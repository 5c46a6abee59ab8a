// stream_kernel: epilogue(x W^T) for 1 to 16 rows of x: W, K-major, is streamed once at the speed of memory.
// launch_product: that, or gemm.cuh for more rows.
//
// Tile      a unit of kUnit weight rows, one tile of the epilogue, per block and round. It goes by groups of 16 weight
//           rows: the 8 warps take steps of 128 bytes of k in turn, together 1 KB of each row, and their partial sums
//           are added in the order of the warps
//
//             steps of k     0    1    2   ..   7    8   ..
//             16 rows of W  w0   w1   w2       w7   w0       -> 8 partial sums -> [16, kUnit] staged -> epilogue
//
// Ring      a lane copies what it multiplies, 4 x 16 bytes per step, by cp.async into slots that it alone reads, 3
//           steps deep: 48 KB in flight per block, and no barrier. The copies run ahead across groups and units, so
//           the barriers between them drain nothing
//
//             row g of W  | t = 0 | t = 1 | t = 2 | t = 3 | t = 0 ..     16 bytes each, of lane 4 g + t
//                         | b  b' |       two mma: a product does not change when both operands permute k alike, so
//                                         8 neighbours of a row are the B registers of two mma.m16n8k16, unshuffled
//
// Traffic   W once, past L1, first to leave L2; x once per block (if it does not fit in shared memory: once per group)
// Bound     memory
// Numerics  fp32 sums in an order that k alone decides: a row of x has the same bits alone and in any batch of up to
//           16, aligned or not, from shared memory or not. Tails are multiplied as zeros
// Requires  nothing of alignment: unaligned rows are copied element by element into the same slots
// Measured  not run on a GPU yet
// Source    written for this project; fragments whose k is permuted as in Marlin (Frantar et al. 2024,
//           arXiv:2408.11743), but with W as it lies
#pragma once

#include "csrc/cuda/dependent_launch.cuh"
#include "csrc/cuda/gemm.cuh"
#include "csrc/cuda/stream_sums.cuh"

namespace persimmon_fast::cuda {

template <typename scalar_t, typename Epilogue>
struct StreamParams {
  StreamInput<scalar_t> input;
  const scalar_t* weight;  // [n, k], rows weight_row_stride elements apart
  int64_t weight_row_stride;
  int64_t n;
  bool weight_aligned;  // every chunk of W is whole and 16-byte aligned
  Epilogue epilogue;
};

// Of the units that are this block's turn, from the one at row0 on: the first one that the epilogue does not skip.
template <int kUnit, typename Epilogue>
DEV int64_t first_unit(const Epilogue& epilogue, int64_t row0, int64_t n) {
  if constexpr (CanSkip<Epilogue>::value) {
    while (row0 < n && epilogue.skips(row0)) row0 += int64_t{gridDim.x} * kUnit;
  }
  return row0;
}

// Which 16 rows of W, which step of k. Warps of a block and blocks of a grid take turns.
template <int kUnit, typename Epilogue>
struct StreamPlace {
  const Epilogue& epilogue;
  int64_t n;
  int64_t row;
  int step;

  DEV void advance(int warp, int num_steps) {
    step += kStreamWarps;
    if (step < num_steps) return;
    step = warp;
    row += kStreamGroup;
    if (row % kUnit != 0) return;
    row = first_unit<kUnit>(epilogue, row + static_cast<int64_t>(gridDim.x - 1) * kUnit, n);
  }
};

template <typename scalar_t, int kUnit, typename Epilogue>
__global__ void __launch_bounds__(kStreamWarps* kWarpSize, 2) stream_kernel(StreamParams<scalar_t, Epilogue> p) {
  constexpr int kThreads = kStreamWarps * kWarpSize;
  constexpr int kChunk = Chunk<scalar_t>::kSize;
  constexpr int kStepChunks = kStreamStepBytes / 16;
  constexpr int kEpilogueThreads = kUnit < kWarpSize ? kWarpSize : kUnit;
  static_assert(kUnit % kStreamGroup == 0 && kEpilogueThreads <= kThreads);
  static_assert(kThreads == kStreamMaxRows * kStreamGroup, "a thread adds the partial sums of one result");
  using Copies = uint4[2][2][kWarpSize];  // of a step and warp: [row half][chunk half][lane]
  const StreamInput<scalar_t>& input = p.input;
  const int num_steps = static_cast<int>(stream_steps(input.k, sizeof(scalar_t)));
  SMEM_CARVER(smem);
  auto* s_ring = reinterpret_cast<Copies*>(smem.take<unsigned char>(kStreamRingBytes, 128));
  float* s_partial = smem.take<float>(stream_partial_bytes(input.rows) / sizeof(float), 128);
  float* s_staged = smem.take<float>(stream_staged_bytes(kUnit) / sizeof(float), 128);
  uint4* s_x = nullptr;
  if (input.in_shared) s_x = smem.take<uint4>(input.rows * num_steps * kStepChunks, 128);
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const uint64_t policy = ptx::evict_first_policy();

  const int64_t end_row = ceil_div(p.n, int64_t{kUnit}) * kUnit;  // what lies behind row n is multiplied as zeros
  Copies* s_slots = s_ring + warp * kStreamStages;
  StreamPlace<kUnit, Epilogue> next{p.epilogue, p.n,
                                    first_unit<kUnit>(p.epilogue, static_cast<int64_t>(blockIdx.x) * kUnit, p.n),
                                    warp};  // to be copied
  const auto issue = [&](int slot) {
    if (next.row < end_row && warp < num_steps) {
      const int first_column = (next.step * kStepChunks + lane % 4) * kChunk;
      // body(its place, row, column) for the 4 chunks of this lane.
      const auto for_chunks = [&](auto body) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int64_t row = next.row + half * 8 + lane / 4;
#pragma unroll
          for (int j = 0; j < 2; ++j) body(&s_slots[slot][half][j][lane], row, first_column + j * 4 * kChunk);
        }
      };
      if (p.weight_aligned) {
        for_chunks([&](uint4* s_chunk, int64_t row, int column) {
          const bool exists = row < p.n && column < input.k;
          const scalar_t* g_chunk = p.weight + row * p.weight_row_stride + column;
          ptx::cp_async16_once(ptx::smem_u32(s_chunk), g_chunk, exists ? 16 : 0, policy);
        });
      } else {
        for_chunks([&](uint4* s_chunk, int64_t row, int column) {
          *s_chunk = read_chunk(p.weight + row * p.weight_row_stride, column, row < p.n ? input.k : 0, false);
        });
      }
      next.advance(warp, num_steps);
    }
    ptx::cp_async_commit();  // empty groups too: the number of groups counts the steps
  };

  // Weights do not depend on the preceding kernel: they are on their way while it ends.
  ptx::launch_dependents();
#pragma unroll
  for (int slot = 0; slot < kStreamStages; ++slot) issue(slot);
  ptx::wait_for_predecessors();
  if (input.in_shared) input.stage(num_steps * kStepChunks, s_x, reinterpret_cast<float2*>(s_partial));
  for (int i = input.rows * kUnit + threadIdx.x; i < kStreamMaxRows * kUnit; i += kThreads) s_staged[i] = 0.0f;
  __syncthreads();

  int slot = 0;
  int buffer = 0;
  const int partial_size = input.rows * kStreamGroup;  // of a warp
  for (int64_t row0 = static_cast<int64_t>(blockIdx.x) * kUnit; row0 < p.n; row0 += int64_t{gridDim.x} * kUnit) {
    if (skip_tile(p.epilogue, 0, row0, input.rows)) continue;
    const StagedTile<kStreamMaxRows, kUnit, kEpilogueThreads> tile{s_staged, 0, row0, input.rows,
                                                                   static_cast<int>(min(p.n - row0, int64_t{kUnit}))};
#pragma unroll 1
    for (int group = 0; group < kUnit; group += kStreamGroup) {
      StreamSums<scalar_t> sums;
#pragma unroll 1
      for (int step = warp; step < num_steps; step += kStreamWarps) {
        sums.load(input, s_x, step * kStepChunks);
        ptx::cp_async_wait<kStreamStages - 1>();
        StreamWeights r_weights;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int j = 0; j < 2; ++j) r_weights[half][j] = s_slots[slot][half][j][lane];
        }
        issue(slot);  // what it overwrites is in this lane's registers
        slot = slot + 1 == kStreamStages ? 0 : slot + 1;
        sums.add(input, s_x, step * kStepChunks, r_weights);
      }
      float* s_buffer = s_partial + buffer * kStreamWarps * partial_size;
      buffer ^= 1;
      sums.store(input.rows, s_buffer + warp * partial_size);
      // Partial sums are there; and all have left the other buffer, and the staged results of the last unit.
      __syncthreads();
      if (static_cast<int>(threadIdx.x) < partial_size) {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < kStreamWarps; ++i) sum += s_buffer[i * partial_size + threadIdx.x];
        tile.at(threadIdx.x / kStreamGroup, group + static_cast<int>(threadIdx.x) % kStreamGroup) = sum;
      }
    }
    __syncthreads();
    if (threadIdx.x < kEpilogueThreads) p.epilogue(tile);
  }
}

// Enqueues epilogue(x W^T) for g.m of 1 to kStreamMaxRows. kUnit: columns of the epilogue's tiles.
template <typename scalar_t, int kUnit, typename Epilogue>
cudaError_t launch_stream(const char* name, const GemmOperands& g, const StreamNorm& norm, const Epilogue& epilogue,
                          int num_multiprocessors, cudaStream_t stream) {
  if (g.k > (1 << 30)) return kTooLarge;  // 32-bit indices inside k
  DeviceLimits limits;
  const cudaError_t error = device_limits(limits);
  if (error != cudaSuccess) return error;
  const StreamPlan plan = plan_stream(g.m, g.k, sizeof(scalar_t), kUnit, limits);
  if (norm.weight != nullptr && !plan.x_in_shared) return cudaErrorInvalidValue;
  constexpr int kChunk = Chunk<scalar_t>::kSize;
  StreamParams<scalar_t, Epilogue> params{};
  params.input.x = static_cast<const scalar_t*>(g.a);
  params.input.row_stride = g.a_row_stride;
  params.input.rows = static_cast<int>(g.m);
  params.input.k = static_cast<int>(g.k);
  params.input.aligned = g.k % kChunk == 0 && g.a_row_stride % kChunk == 0 && is_aligned(g.a) &&
                         is_aligned(norm.weight) && is_aligned(norm.bias);
  params.input.in_shared = plan.x_in_shared;
  params.input.norm = norm;
  params.weight = static_cast<const scalar_t*>(g.b);
  params.weight_row_stride = g.b_row_stride;
  params.n = g.n;
  params.weight_aligned = g.k % kChunk == 0 && g.b_row_stride % kChunk == 0 && is_aligned(g.b);
  params.epilogue = epilogue;
  const int64_t num_units = num_tiles(g.n, kUnit);
  const int64_t capacity = int64_t{num_multiprocessors} * plan.blocks_per_multiprocessor;
  return launch_dependent(name, stream_kernel<scalar_t, kUnit, Epilogue>,
                          static_cast<unsigned>(num_units < capacity ? num_units : capacity), kStreamWarps * kWarpSize,
                          plan.smem_bytes, stream, params);
}

// Enqueues epilogue(A B^T), B K-major: streamed in units of kUnit rows where A has few rows, else by launch_gemm.
template <typename scalar_t, int kUnit, int kSmallBlockN = 64, typename Epilogue>
cudaError_t launch_product(const char* name, const GemmOperands& g, const StreamNorm& norm, const Epilogue& epilogue,
                           int num_multiprocessors, cudaStream_t stream) {
  if (g.m == 0 || g.n == 0) return cudaSuccess;
  if (g.m <= kStreamMaxRows) {
    return launch_stream<scalar_t, kUnit>(name, g, norm, epilogue, num_multiprocessors, stream);
  }
  if (norm.weight != nullptr) return cudaErrorInvalidValue;
  return launch_gemm<scalar_t, BOrder::kKMajor, kSmallBlockN>(name, g, epilogue, num_multiprocessors, stream);
}

}  // namespace persimmon_fast::cuda
