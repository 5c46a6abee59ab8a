// What the instructions of sm_90a compute.
#include "tests/emu/sm90_kernel.h"

// ---- TMA: array 1 describes the box: rank, size[5], stride[5], box[5], at[5], swizzle ----

struct BoxDescription {
  int64_t rank, size[5], stride[5], box[5], at[5], swizzle;
};
static int box_bytes(const BoxDescription& box) {
  int64_t bytes = 2;
  for (int i = 0; i < box.rank; ++i) bytes *= box.box[i];
  return static_cast<int>(bytes);
}
static void described_map(Sm90Args& args) {
  const auto& description = *args.array<BoxDescription>(1);
  int box[5];
  for (int i = 0; i < 5; ++i) box[i] = static_cast<int>(description.box[i]);
  emu::encode_tensor_map(args.array<char>(0), static_cast<int>(description.rank), description.size, description.stride,
                         box, args.a, static_cast<emu::Swizzle>(description.swizzle));
}
constexpr size_t kBoxBytes = 64 * 1024;

// out = shared memory after the load.
SM90_CASE(tma_load_box, described_map, 1, 64, 1, kBoxBytes + 16) {
  SMEM_CARVER(smem);
  uint32_t* s_box = smem.take<uint32_t>(kBoxBytes / 4, 1024);
  const uint32_t barrier = ptx::smem_u32(smem.take<uint64_t>(1));
  const auto& description = *args.array<BoxDescription>(1);
  int at[5];
  for (int i = 0; i < 5; ++i) at[i] = static_cast<int>(description.at[i]);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(barrier, box_bytes(description));
    emu::tma_load(ptx::smem_u32(s_box), &args.a, barrier, static_cast<int>(description.rank), at, 0,
                  {__FILE__, __LINE__});
  }
  __syncthreads();
  ptx::mbarrier_wait(barrier, 0);
  for (int i = static_cast<int>(threadIdx.x); i < box_bytes(description) / 4; i += 64) {
    args.array<uint32_t>(2)[i] = s_box[i];
  }
}

// Array 2 = shared memory before the store.
SM90_CASE(tma_store_box, described_map, 1, 64, 1, kBoxBytes) {
  SMEM_CARVER(smem);
  uint32_t* s_box = smem.take<uint32_t>(kBoxBytes / 4, 1024);
  const auto& description = *args.array<BoxDescription>(1);
  int at[5];
  for (int i = 0; i < 5; ++i) at[i] = static_cast<int>(description.at[i]);
  for (int i = static_cast<int>(threadIdx.x); i < box_bytes(description) / 4; i += 64) {
    s_box[i] = args.array<uint32_t>(2)[i];
  }
  ptx::fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    emu::tma_store(&args.a, ptx::smem_u32(s_box), static_cast<int>(description.rank), at, {__FILE__, __LINE__});
    ptx::tma_store_commit();
    ptx::tma_store_wait_read<0>();
  }
}

// ---- wgmma ----

// Arrays: 0: what lies in shared memory, 24 KB of a, then 64 KB of b. 1: per step of k two descriptors, whose addresses
// count from the operands. 2: registers of a, [step][thread][4]. 3: d, [thread][R], added to.
// Numbers: 0: steps; 1: whether a lies in registers; 2: whether the first step adds.
template <int kTransB, int R, class scalar_t>
static void multiply_shared(const Sm90Args& args) {
  constexpr int kABytes = 24 * 1024, kBBytes = 64 * 1024;
  SMEM_CARVER(smem);
  uint32_t* s_a = smem.take<uint32_t>(kABytes / 4, 1024);
  uint32_t* s_b = smem.take<uint32_t>(kBBytes / 4, 1024);
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < kABytes / 4; i += 128) s_a[i] = args.array<uint32_t>(0)[i];
  for (int i = thread; i < kBBytes / 4; i += 128) s_b[i] = args.array<uint32_t>(0)[kABytes / 4 + i];
  ptx::fence_proxy_async();
  __syncthreads();
  float d[R];
  float* out = args.array<float>(3) + thread * R;
  for (int i = 0; i < R; ++i) d[i] = out[i];
  const int num_steps = static_cast<int>(args.numbers[0]);
  const uint64_t* descriptors = args.array<uint64_t>(1);
  const uint64_t a_base = ptx::smem_u32(s_a) >> 4, b_base = ptx::smem_u32(s_b) >> 4;
  uint32_t a[8][4];
  ptx::wgmma_fence();
  for (int step = 0; step < num_steps; ++step) {
    const uint64_t b_operand = descriptors[2 * step + 1] + b_base;
    const bool accumulate = step > 0 || args.numbers[2] != 0;
    if (args.numbers[1] == 0) {
      ptx::wgmma_ss<kTransB>(d, descriptors[2 * step] + a_base, b_operand, accumulate, scalar_t{});
    } else {
      for (int i = 0; i < 4; ++i) a[step][i] = args.array<uint32_t>(2)[(step * 128 + thread) * 4 + i];
      ptx::wgmma_rs<kTransB>(d, a[step], b_operand, accumulate, scalar_t{});
    }
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  for (int i = 0; i < R; ++i) out[i] = d[i];
}
#define WGMMA_CASES(columns)                                                                                          \
  SM90_CASE(wgmma_##columns##_bf16, no_maps, 1, 128, 1, 88 * 1024) {                                                  \
    multiply_shared<0, columns / 2, __nv_bfloat16>(args);                                                             \
  }                                                                                                                   \
  SM90_CASE(wgmma_##columns##_bf16_trans, no_maps, 1, 128, 1, 88 * 1024) {                                            \
    multiply_shared<1, columns / 2, __nv_bfloat16>(args);                                                             \
  }                                                                                                                   \
  SM90_CASE(wgmma_##columns##_fp16, no_maps, 1, 128, 1, 88 * 1024) { multiply_shared<0, columns / 2, __half>(args); } \
  SM90_CASE(wgmma_##columns##_fp16_trans, no_maps, 1, 128, 1, 88 * 1024) {                                            \
    multiply_shared<1, columns / 2, __half>(args);                                                                    \
  }
WGMMA_CASES(64)
WGMMA_CASES(128)
WGMMA_CASES(192)
WGMMA_CASES(256)
