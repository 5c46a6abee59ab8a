// One kernel per mistake that the emulator must find. Unless args.broken(), the kernel is correct. test_faults.py says
// which configuration must find it, and what the message must tell.
#include "tests/emu/test_kernel.h"

#define SITE {__FILE__, __LINE__}

// ---- barriers ----

CASE(missing_barrier, 1, 64, 0) {
  STATIC_SMEM(int, s_values, 64);
  s_values[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (!args.broken()) __syncthreads();
  args.array<int>(0)[threadIdx.x] = s_values[63 - threadIdx.x];
}

CASE(missing_barrier_before_reuse, 1, 64, 0) {
  STATIC_SMEM(int, s_values, 64);
  for (int step = 0; step < 3; ++step) {
    s_values[threadIdx.x] = step * 100 + static_cast<int>(threadIdx.x);
    __syncthreads();
    args.array<int>(0)[step * 64 + static_cast<int>(threadIdx.x)] = s_values[63 - threadIdx.x];
    if (!args.broken()) __syncthreads();
  }
}

CASE(divergent_barrier, 1, 64, 0) {
  if (args.broken() && threadIdx.x % 32 < 16) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

// One warp makes one round more, and its barrier meets another one of the other warp.
CASE(uneven_rounds, 1, 64, 0) {
  const unsigned rounds = args.broken() && threadIdx.x >= 32 ? 3 : 2;
  for (unsigned i = 0; i < rounds; ++i) __syncthreads();
  __syncthreads();
}

CASE(deadlock, 1, 64, 0) {
  if (!args.broken() || threadIdx.x < 32) emu::barrier_sync(1, 64, SITE);
}

// ---- warp operations ----

CASE(divergent_shuffle, 1, 32, 0) {
  int value = static_cast<int>(threadIdx.x);
  if (args.broken() && threadIdx.x < 16) {
    value = __shfl_xor_sync(~0u, value, 1);
  } else {
    value = __shfl_xor_sync(~0u, value, 1);
  }
  args.array<int>(0)[threadIdx.x] = value;
}

CASE(exited_lane, 1, 32, 0) {
  if (args.broken() && threadIdx.x >= 16) return;
  __syncwarp();
}

CASE(lane_leaves_others_waiting, 1, 32, 0) {
  if (args.broken() && threadIdx.x < 16) return;
  __syncwarp();
}

CASE(lane_not_in_mask, 1, 32, 0) { __syncwarp(args.broken() ? 0xfffffffeu : ~0u); }

CASE(shuffle_from_outside_the_mask, 1, 16, 0) {
  const unsigned mask = 0xffff;
  __shfl_sync(mask, 1, args.broken() ? 20 : 2);
}

// ---- shared memory ----

CASE(shared_write_behind, 1, 64, 0) {
  STATIC_SMEM(int, s_values, 64);
  s_values[threadIdx.x + opaque(args.broken() ? 1 : 0)] = 0;
}
CASE(shared_write_before, 1, 64, 0) {
  STATIC_SMEM(int, s_values, 64);
  s_values[static_cast<int>(threadIdx.x) - opaque(args.broken() ? 1 : 0)] = 0;
}
CASE(shared_read_behind, 1, 64, 64 * sizeof(int)) {
  SMEM_CARVER(smem);
  int* s_values = smem.take<int>(64);
  s_values[threadIdx.x] = 0;
  args.array<int>(0)[threadIdx.x] = s_values[threadIdx.x + opaque(args.broken() ? 1 : 0)];
}
CASE(uninitialised_shared, 1, 64, 0) {
  STATIC_SMEM(float, s_values, 64);
  if (!args.broken() || threadIdx.x != 7) s_values[threadIdx.x] = 1.0f;
  __syncthreads();
  args.array<float>(0)[threadIdx.x] = s_values[threadIdx.x];
}
CASE(threads_disagree_on_layout, 1, 64, 1024) {
  SMEM_CARVER(smem);
  smem.take<float>(args.broken() && threadIdx.x == 3 ? 8 : 16);
}
CASE(array_beyond_the_launch, 1, 32, 1024) {
  SMEM_CARVER(smem);
  smem.take<float>(128);
  smem.take<float>(args.broken() ? 129 : 128);
}
CASE(not_shared, 1, 32, 0) {
  STATIC_SMEM(int, s_value, 1);
  emu::smem_u32(args.broken() ? args.array<int>(0) : s_value);
}

// ---- limits ----

CASE(static_shared_too_large, 1, 32, 0) {
  STATIC_SMEM(char, s_all, 48 * 1024);
  if (args.broken()) {
    STATIC_SMEM(char, s_more, 16);
    s_more[0] = 0;
  }
  s_all[0] = 0;
}
CASE(dynamic_shared_too_large, 1, 32, 99 * 1024 + (args.broken() ? 16 : 0)) {}
CASE(static_and_dynamic_too_large, 1, 32, 90 * 1024) {
  STATIC_SMEM(char, s_all, 9 * 1024);
  if (args.broken()) {
    STATIC_SMEM(char, s_more, 16);
    s_more[0] = 0;
  }
  s_all[0] = 0;
}
CASE(block_too_large, 1, args.broken() ? 1025 : 1024, 0) {}
CASE(grid_too_large, dim3(1, args.broken() ? 65536 : 1), 32, 0) {}
CASE(grid_empty, dim3(1, args.broken() ? 0 : 1), 32, 0) {}

// ---- matrix instructions and asynchronous copies ----

CASE(ldmatrix_out_of_bounds, 1, 32, 1024) {
  SMEM_CARVER(smem);
  const uint32_t rows = emu::smem_u32(smem.take<uint16_t>(32 * 8));
  uint32_t r[4];
  emu::ldmatrix<4, false>(r, rows + (threadIdx.x + (args.broken() ? 1 : 0)) * 16, SITE);
}
CASE(ldmatrix_misaligned, 1, 32, 1024) {
  SMEM_CARVER(smem);
  const uint32_t rows = emu::smem_u32(smem.take<uint16_t>(32 * 8 + 8));
  uint32_t r[4];
  emu::ldmatrix<4, false>(r, rows + threadIdx.x * 16 + (args.broken() ? 8 : 0), SITE);
}
CASE(cp_async_misaligned, 1, 1, 64) {
  SMEM_CARVER(smem);
  const uint32_t to = emu::smem_u32(smem.take<float>(4));
  emu::cp_async(to, args.array<float>(0) + (args.broken() ? 1 : 0), 16, 16, SITE);
  emu::cp_async_wait(0);
}
CASE(cp_async_out_of_bounds, 1, 1, 64) {
  SMEM_CARVER(smem);
  const uint32_t to = emu::smem_u32(smem.take<float>(4));
  emu::cp_async(to, args.array<float>(0) + (args.broken() ? 512 : 508), 16, 16, SITE);  // 512 floats
  emu::cp_async_commit();
  emu::cp_async_wait(0);
}
CASE(two_copies_to_one_place, 1, 1, 64) {
  SMEM_CARVER(smem);
  const uint32_t to = emu::smem_u32(smem.take<float>(8));
  emu::cp_async(to, args.array<float>(0), 16, 16, SITE);
  emu::cp_async(to + (args.broken() ? 0 : 16), args.array<float>(0), 16, 16, SITE);
}

// Two groups in flight, of which the first is read: by plain loads, or by ldmatrix.
static void read_first_of_two(const Args& args, int pending, bool by_ldmatrix) {
  SMEM_CARVER(smem);
  float* s_values = smem.take<float>(2 * 32 * 4);
  const unsigned lane = threadIdx.x;
  for (unsigned group = 0; group < 2; ++group) {
    const unsigned at = (group * 32 + lane) * 4;
    emu::cp_async(emu::smem_u32(s_values + at), args.array<float>(0) + at, 16, 16, SITE);
    emu::cp_async_commit();
  }
  emu::cp_async_wait(pending);
  __syncthreads();
  if (by_ldmatrix) {
    uint32_t r[4];
    emu::ldmatrix<4, false>(r, emu::smem_u32(s_values + lane * 4), SITE);
    args.array<uint32_t>(1)[lane] = r[0];
  } else {
    args.array<float>(1)[lane] = s_values[(31 - lane) * 4];
  }
}
CASE(wrong_wait_count, 1, 32, 2 * 32 * 16) { read_first_of_two(args, args.broken() ? 2 : 1, false); }
CASE(wrong_wait_count_ldmatrix, 1, 32, 2 * 32 * 16) { read_first_of_two(args, args.broken() ? 2 : 1, true); }

// The wait covers the copies of the waiting thread alone.
CASE(missing_barrier_after_wait, 1, 64, 64 * 16) {
  SMEM_CARVER(smem);
  float* s_values = smem.take<float>(64 * 4);
  emu::cp_async(emu::smem_u32(s_values + threadIdx.x * 4), args.array<float>(0) + threadIdx.x * 4, 16, 16, SITE);
  emu::cp_async_commit();
  emu::cp_async_wait(0);
  if (!args.broken()) __syncthreads();
  args.array<float>(1)[threadIdx.x] = s_values[(63 - threadIdx.x) * 4];
}

// ---- global memory ----

CASE(global_read_behind, 1, 64, 0) {  // 512 floats
  args.array<float>(1)[threadIdx.x] = args.array<float>(0)[512 - 64 + threadIdx.x + opaque(args.broken() ? 1 : 0)];
}
CASE(global_write_behind, 1, 64, 0) {
  args.array<float>(0)[512 - 64 + threadIdx.x + opaque(args.broken() ? 1 : 0)] = 0.0f;
}
CASE(null_pointer, 1, 64, 0) { *opaque(args.broken() ? nullptr : args.array<int>(0) + threadIdx.x) = 1; }
CASE(misaligned_vector, 1, 1, 0) {
  const float* in = args.array<float>(0) + opaque(args.broken() ? 1 : 0);
  const float4 values = *reinterpret_cast<const float4*>(in);
  args.array<float>(1)[0] = values.x + values.w;
}
CASE(misaligned_atomic, 1, 1, 0) {
  atomicAdd(reinterpret_cast<int*>(args.array<char>(0) + (args.broken() ? 2 : 0)), 1);
}
CASE(integer_overflow, 1, 1, 0) { args.array<int>(0)[0] = opaque(args.broken() ? 0x7fffffff : 1) + opaque(1); }
__attribute__((noinline)) static void use_local_memory() {
  char large[500 * 1024];
  large[0] = 1;
  opaque(&large[0]);
}
CASE(stack_overflow, 1, 1, 0) {
  if (args.broken()) use_local_memory();
}

// ---- races in global memory, between threads and between blocks ----

CASE(race_in_block, 1, 64, 0) {
  if (threadIdx.x == 0) args.array<int>(0)[0] = 1;
  if (!args.broken()) __syncthreads();
  args.array<int>(1)[threadIdx.x] = args.array<int>(0)[0];
}
CASE(race_between_blocks, 2, 32, 0) {
  int* values = args.array<int>(0);
  if (blockIdx.x == 0) values[threadIdx.x] = 1;
  if (blockIdx.x == 1) args.array<int>(1)[threadIdx.x] = values[args.broken() ? threadIdx.x : threadIdx.x + 32];
}
// The last of four blocks adds what all have written. numbers[0]: the mistake.
enum { kNoFence, kBlockFence, kNoBarrier };
CASE(last_block, 4, 32, 0) {
  STATIC_SMEM(unsigned, s_ticket, 1);
  int* parts = args.array<int>(0);
  parts[blockIdx.x * 32 + threadIdx.x] = 1;
  const int64_t mistake = args.broken() ? args.numbers[0] : -1;
  if (mistake == kBlockFence) {
    __threadfence_block();
  } else if (mistake != kNoFence) {
    __threadfence();
  }
  if (mistake != kNoBarrier) __syncthreads();
  if (threadIdx.x == 0) {
    s_ticket[0] = atomicAdd(args.array<unsigned>(1), 1u);
    __threadfence();
  }
  __syncthreads();
  if (s_ticket[0] != gridDim.x - 1) return;
  int sum = 0;
  for (unsigned block = 0; block < gridDim.x; ++block) sum += parts[block * 32 + threadIdx.x];
  args.array<int>(2)[threadIdx.x] = sum;
}
CASE(plain_read_of_a_flag, 2, 1, 0) {
  unsigned* flag = args.array<unsigned>(0);
  if (blockIdx.x == 0) atomicExch(flag, 1u);
  if (blockIdx.x == 1) args.array<unsigned>(1)[0] = args.broken() ? *flag : emu::ld_acquire(flag, SITE);
}
CASE(relaxed_message, 2, 1, 0) {  // a message whose flag does not release it
  int* message = args.array<int>(0);
  unsigned* flag = args.array<unsigned>(1);
  if (blockIdx.x == 0) {
    message[0] = 5;
    if (args.broken()) {
      atomicExch(flag, 1u);
    } else {
      emu::st_release(flag, 1u, SITE);
    }
  } else {
    while (emu::ld_acquire(flag, SITE) == 0) {
    }
    args.array<int>(2)[0] = message[0];
  }
}
CASE(livelock, 1, 32, 0) {
  unsigned* flag = args.array<unsigned>(0);
  if (threadIdx.x == 1 && !args.broken()) emu::st_release(flag, 1u, SITE);
  if (threadIdx.x == 0) {
    while (emu::ld_acquire(flag, SITE) == 0) {
    }
  }
}

// ---- dependent launches ----

static void produce(Args args) {
  args.array<int>(0)[threadIdx.x] = static_cast<int>(threadIdx.x) + args.array<int>(1)[0];
}

// numbers[0]: where the dependent kernel waits.
enum { kNever, kBeforeAll, kAfterRead, kAfterWrite };
static void consume(Args args) {
  const int64_t wait = args.broken() ? args.numbers[0] : int64_t{kBeforeAll};
  const int weight = args.array<int>(2)[threadIdx.x];  // nobody writes the weights: may be read before the wait
  if (wait == kAfterWrite) args.array<int>(1)[threadIdx.x] = 7;
  if (wait == kBeforeAll) emu::griddepcontrol_wait();
  emu::griddepcontrol_launch_dependents();
  const int value = args.array<int>(0)[threadIdx.x];
  if (wait == kAfterRead || wait == kAfterWrite) emu::griddepcontrol_wait();
  args.array<int>(3)[threadIdx.x] = value * weight;
}
static const Registration dependent_launch_registration("dependent_launch", [](const Args& args) {
  emu::launch_named("produce", produce, 1, 32, 0, args);
  emu::launch_dependent_named("consume", consume, 1, 32, 0, args);
});
