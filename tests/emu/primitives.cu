// What each primitive computes.
#include "tests/emu/test_kernel.h"

// out[block][thread]: the built-in variables, packed.
CASE(builtin_variables, dim3(2, 3, 2), dim3(4, 3, 2), 0) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  args.array<unsigned>(0)[block * 24 + thread] = block * 1000 + thread;
}

// out[lane][i]; 16 lanes of them in the half-warp mask.
CASE(shuffles, 1, 32, 0) {
  const int lane = static_cast<int>(threadIdx.x), value = lane * 10;
  int* out = args.array<int>(0) + lane * 10;
  out[0] = __shfl_sync(~0u, value, 5);
  out[1] = __shfl_sync(~0u, value, lane + 1, 8);
  out[2] = __shfl_xor_sync(~0u, value, 3);
  out[3] = __shfl_xor_sync(~0u, value, 8, 8);  // the partner lies in another group of 8: an earlier one or none
  out[4] = __shfl_down_sync(~0u, value, 2);
  out[5] = __shfl_down_sync(~0u, value, 2, 4);
  out[6] = __shfl_up_sync(~0u, value, 3);
  out[7] = __shfl_up_sync(~0u, value, 1, 16);
  out[8] = static_cast<int>(__shfl_xor_sync(~0u, static_cast<double>(value), 1));
  out[9] = -1;
  const unsigned half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  for (int step = 0; step < (lane < 16 ? 3 : 2); ++step) out[9] = __shfl_xor_sync(half, value + step, 1);
}

CASE(votes, 1, 32, 0) {
  const int lane = static_cast<int>(threadIdx.x);
  unsigned* out = args.array<unsigned>(0) + lane * 4;
  out[0] = __ballot_sync(~0u, lane % 3 == 0);
  out[1] = static_cast<unsigned>(__any_sync(~0u, lane == 7));
  out[2] = static_cast<unsigned>(__all_sync(~0u, lane < 31));
  const unsigned quarter = 0xffu << lane / 8 * 8;
  out[3] = __ballot_sync(quarter, lane % 2);
}

CASE(reductions, 1, 32, 0) {
  const int lane = static_cast<int>(threadIdx.x);
  int* out = args.array<int>(0) + lane * 8;
  out[0] = __reduce_add_sync(~0u, lane - 10);
  out[1] = __reduce_min_sync(~0u, lane - 10);
  out[2] = __reduce_max_sync(~0u, -lane - 5);
  out[3] = static_cast<int>(__reduce_max_sync(~0u, static_cast<unsigned>(lane)));
  out[4] = static_cast<int>(__reduce_and_sync(~0u, static_cast<unsigned>(lane | 64)));
  out[5] = static_cast<int>(__reduce_or_sync(~0u, static_cast<unsigned>(lane)));
  out[6] = static_cast<int>(__reduce_xor_sync(~0u, static_cast<unsigned>(lane * lane)));
  out[7] = __popc(0xf0u) * 1000000 + __ffs(8) * 10000 + __clz(1) * 100 + __popcll(7ull << 40);
}

// Counters that all threads of all blocks change.
CASE(atomics, 4, 64, 0) {
  const int thread = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  int* counters = args.array<int>(0);
  atomicAdd(&counters[0], 1);
  atomicSub(&counters[1], 2);
  atomicMax(&counters[2], thread);
  atomicMin(&counters[3], -thread);
  atomicOr(&counters[4], 1 << thread % 31);
  atomicXor(&counters[5], thread);
  atomicExch(&counters[6], 42);
  for (;;) {  // a product by compare and swap: 256 times + 3
    const int old = atomicAdd(&counters[7], 0);
    if (atomicCAS(&counters[7], old, old + 3) == old) break;
  }
  atomicInc(reinterpret_cast<unsigned*>(&counters[8]), 99);
  atomicAnd(&counters[9], ~(1 << thread % 31));
  atomicAdd(args.array<float>(1), 0.5f);
  atomicAdd(args.array<double>(2), 0.25);
  atomicAdd(args.array<unsigned long long>(3), 1ull << 33);
}

// out: [4 rows of 16 bytes] copied with 4, 8, 16 bytes, the last one with numbers[0] valid bytes.
CASE(cp_async_sizes, 1, 32, 64) {
  SMEM_CARVER(smem);
  unsigned char* s_rows = smem.take<unsigned char>(64);
  const unsigned char* in = args.array<unsigned char>(0);
  const unsigned lane = threadIdx.x;
  const uint32_t row = emu::smem_u32(s_rows);
  const emu::Site site{__FILE__, __LINE__};
  if (lane < 4) emu::cp_async(row + lane * 4, in + lane * 4, 4, 4, site);
  if (lane < 2) emu::cp_async(row + 16 + lane * 8, in + 16 + lane * 8, 8, 8, site);
  if (lane == 0) emu::cp_async(row + 32, in + 32, 16, 16, site);
  if (lane == 1) emu::cp_async(row + 48, in + 48, 16, static_cast<uint32_t>(args.numbers[0]), site);
  emu::cp_async_commit();
  emu::cp_async_wait(0);
  __syncthreads();
  for (unsigned i = lane; i < 64; i += 32) args.array<unsigned char>(1)[i] = s_rows[i];
}

// A pipeline of three stages over numbers[0] tiles of 64 floats: out[tile] = sum of the tile.
CASE(cp_async_pipeline, 1, 16, 3 * 64 * sizeof(float)) {
  SMEM_CARVER(smem);
  float* s_tiles = smem.take<float>(3 * 64);
  const unsigned thread = threadIdx.x;
  const int num_tiles = static_cast<int>(args.numbers[0]);
  const auto issue = [&](int tile) {
    if (tile < num_tiles) {
      emu::cp_async(emu::smem_u32(s_tiles + tile % 3 * 64 + thread * 4), args.array<float>(0) + tile * 64 + thread * 4,
                    16, 16, {__FILE__, __LINE__});
    }
    emu::cp_async_commit();
  };
  issue(0);
  issue(1);
  for (int tile = 0; tile < num_tiles; ++tile) {
    emu::cp_async_wait(1);
    __syncthreads();
    issue(tile + 2);
    float sum = 0.0f;
    for (int i = 0; i < 64; ++i) sum += s_tiles[tile % 3 * 64 + i];
    args.array<float>(1)[tile * 16 + thread] = sum;
  }
}

// Two pairs of warps, each with a named barrier of its own: the second warp of a pair reads what the first wrote.
CASE(named_barriers, 1, 128, 0) {
  STATIC_SMEM(int, s_values, 64);
  const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int id = 1 + static_cast<int>(warp / 2);
  if (warp % 2 == 0) {
    s_values[warp / 2 * 32 + lane] = static_cast<int>(threadIdx.x);
    emu::barrier_arrive(id, 64, {__FILE__, __LINE__});
  } else {
    emu::barrier_sync(id, 64, {__FILE__, __LINE__});
    args.array<int>(0)[warp / 2 * 32 + lane] = s_values[warp / 2 * 32 + (lane ^ 1)];
  }
}

// Block b waits for block b - 1 and continues its sum: a chain through release and acquire. All blocks are resident.
CASE(chain_of_blocks, 4, 32, 0) {
  int* sums = args.array<int>(0);
  unsigned* flags = args.array<unsigned>(1);
  const unsigned block = blockIdx.x;
  if (block > 0) {
    while (emu::ld_acquire(&flags[block - 1], {__FILE__, __LINE__}) == 0) {
    }
  }
  const int before = block > 0 ? sums[(block - 1) * 32 + threadIdx.x] : 0;
  sums[block * 32 + threadIdx.x] = before + static_cast<int>(threadIdx.x);
  __syncthreads();
  if (threadIdx.x == 0) emu::st_release(&flags[block], 1u, {__FILE__, __LINE__});
}

// A barrier of all blocks: each reads, after it, what its neighbour wrote before it.
CASE(grid_barrier, 4, 32, 0) {
  int* values = args.array<int>(0);
  unsigned* arrived = args.array<unsigned>(1);
  values[blockIdx.x * 32 + threadIdx.x] = static_cast<int>(blockIdx.x * 100 + threadIdx.x);
  __syncthreads();
  if (threadIdx.x == 0) {
    emu::atom_add_acq_rel(arrived, 1u, {__FILE__, __LINE__});
    while (emu::ld_acquire(arrived, {__FILE__, __LINE__}) < gridDim.x) {
    }
  }
  __syncthreads();
  args.array<int>(2)[blockIdx.x * 32 + threadIdx.x] = values[(blockIdx.x + 1) % 4 * 32 + threadIdx.x];
}

CASE(byte_permutes, 1, 1, 0) {
  unsigned* out = args.array<unsigned>(0);
  out[0] = __byte_perm(0x33221100u, 0x77665544u, 0x5410);
  out[1] = __byte_perm(0x33221100u, 0x77665544u, 0x7632);
  out[2] = __byte_perm(0x33221100u, 0x77665544u, 0x0167);
}

CASE(math, 1, 1, 0) {
  float* out = args.array<float>(0);
  const float x = out[0];
  out[0] = rsqrtf(x);
  out[1] = __expf(x);
  out[2] = exp2f(x);
  out[3] = fmaf(x, x, 1.0f);
  out[4] = fminf(x, NAN);
  out[5] = log1pf(x);
  out[6] = __saturatef(x);
  out[7] = __int_as_float(__float_as_int(x) + 1);
  out[8] = __bfloat162float(__float2bfloat16_rn(x));
  out[9] = __half2float(__float2half_rn(x));
}
