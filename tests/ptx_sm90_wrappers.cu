// One kernel per wrapper of csrc/cuda/ptx_sm90.cuh and wgmma.cuh, for test_ptx_sm90_wrappers.py: compiled by g++ for
// the emulator and by nvcc for a GPU of compute capability 9.0, to show that both do the same.
#include "csrc/cuda/launch_sm90.cuh"
#include "csrc/cuda/wgmma.cuh"

#include <cstring>

namespace persimmon_fast::cuda {
namespace {

struct Params {
  void* p[4];
  CUtensorMap map;
};

#ifdef PF_SM90A

// A barrier that one arrival completes.
DEV uint32_t make_barrier(uint64_t* s_barrier) {
  const uint32_t barrier = ptx::smem_u32(s_barrier);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  return barrier;
}

template <int N>
DEV void read_coordinates(int (&at)[N], const void* from) {
  for (int i = 0; i < N; ++i) at[i] = static_cast<const int*>(from)[i];
}

#endif

constexpr int kBoxBytes = 8 * 1024;

// 1: coordinates; 2: what arrived in shared memory. _multicast: by a cluster of one block to itself.
template <int N, bool kMulticast = false>
__global__ void __launch_bounds__(128) tma_load_kernel(const __grid_constant__ Params args) {
#ifdef PF_SM90A
  SMEM_CARVER(smem);
  uint32_t* s_box = smem.take<uint32_t>(kBoxBytes / 4, 1024);
  const uint32_t barrier = make_barrier(smem.take<uint64_t>(1));
  int at[N];
  read_coordinates(at, args.p[1]);
  if (threadIdx.x == 0) {
    ptx::prefetch_tensor_map(&args.map);
    ptx::mbarrier_arrive_expect_tx(barrier, kBoxBytes);
    if constexpr (kMulticast) {
      ptx::tma_load_multicast(ptx::smem_u32(s_box), &args.map, barrier, at, 1);
    } else {
      ptx::tma_load(ptx::smem_u32(s_box), &args.map, barrier, at);
    }
  }
  ptx::mbarrier_wait(barrier, 0);
  for (int i = static_cast<int>(threadIdx.x); i < kBoxBytes / 4; i += 128)
    static_cast<uint32_t*>(args.p[2])[i] = s_box[i];
#endif
}

// 1: coordinates; 2: what lies in shared memory.
template <int N>
__global__ void __launch_bounds__(128) tma_store_kernel(const __grid_constant__ Params args) {
#ifdef PF_SM90A
  SMEM_CARVER(smem);
  uint32_t* s_box = smem.take<uint32_t>(kBoxBytes / 4, 1024);
  int at[N];
  read_coordinates(at, args.p[1]);
  for (int i = static_cast<int>(threadIdx.x); i < kBoxBytes / 4; i += 128)
    s_box[i] = static_cast<uint32_t*>(args.p[2])[i];
  ptx::fence_proxy_async();
  __syncthreads();
  if (threadIdx.x != 0) return;
  ptx::tma_store(&args.map, ptx::smem_u32(s_box), at);
  ptx::tma_store_commit();
  ptx::tma_store_wait_read<0>();
  ptx::tma_store_wait<0>();
#endif
}

// As multiply_shared of tests/emu/sm90_primitives.cu: 0: shared memory; 1: descriptors, [step][a, b]; 2: registers of
// a, [step][thread][4]; 3: d, [thread][kR].
template <int kTransB, int kR, bool kRegisters, typename scalar_t>
__global__ void __launch_bounds__(128) wgmma_kernel(const __grid_constant__ Params args) {
#ifdef PF_SM90A
  constexpr int kABytes = 24 * 1024;
  constexpr int kBBytes = 64 * 1024;
  SMEM_CARVER(smem);
  uint32_t* s_a = smem.take<uint32_t>(kABytes / 4, 1024);
  uint32_t* s_b = smem.take<uint32_t>(kBBytes / 4, 1024);
  const int thread = static_cast<int>(threadIdx.x);
  const uint32_t* memory = static_cast<const uint32_t*>(args.p[0]);
  for (int i = thread; i < kABytes / 4; i += 128) s_a[i] = memory[i];
  for (int i = thread; i < kBBytes / 4; i += 128) s_b[i] = memory[kABytes / 4 + i];
  ptx::fence_proxy_async();
  __syncthreads();
  float d[kR];
  float* out = static_cast<float*>(args.p[3]) + thread * kR;
  for (int i = 0; i < kR; ++i) d[i] = out[i];
  uint32_t a[4][4];
  for (int i = 0; i < 16; ++i) a[i / 4][i % 4] = static_cast<uint32_t*>(args.p[2])[(i / 4 * 128 + thread) * 4 + i % 4];
  const uint64_t* descriptors = static_cast<const uint64_t*>(args.p[1]);
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    const uint64_t b = descriptors[2 * step + 1] + (ptx::smem_u32(s_b) >> 4);
    if constexpr (kRegisters) {
      ptx::wgmma_rs<kTransB>(d, a[step], b, true, scalar_t{});
    } else {
      ptx::wgmma_ss<kTransB>(d, descriptors[2 * step] + (ptx::smem_u32(s_a) >> 4), b, true, scalar_t{});
    }
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  for (int i = 0; i < kR; ++i) out[i] = d[i];
#endif
}

// 0: registers, [lane][4]; 1: the matrices, row after row.
__global__ void __launch_bounds__(128) stmatrix_kernel(const __grid_constant__ Params args) {
#ifdef PF_SM90A
  STATIC_SMEM(uint4, s_rows, 32);
  const int lane = static_cast<int>(threadIdx.x);
  if (lane >= 32) return;
  uint32_t r[4];
  for (int i = 0; i < 4; ++i) r[i] = static_cast<uint32_t*>(args.p[0])[lane * 4 + i];
  ptx::stmatrix(ptx::smem_u32(s_rows + lane), r);
  __syncwarp();
  static_cast<uint4*>(args.p[1])[lane] = s_rows[lane];
#endif
}

// Two blocks. 0: out[block][0][t] = number of thread t + 1 of the other block, which it reads there; [block][1][t] =
// what the other block's thread t stores here, once its barrier has told: 1000 more.
__global__ void __launch_bounds__(128) cluster_kernel(const __grid_constant__ Params args) {
#ifdef PF_SM90A
  STATIC_SMEM(int, s_values, 128);
  STATIC_SMEM(int, s_given, 128);
  STATIC_SMEM(uint64_t, s_barrier, 1);
  const int thread = static_cast<int>(threadIdx.x);
  const int rank = ptx::cluster_rank();
  const uint32_t barrier = make_barrier(s_barrier);
  s_values[thread] = 128 * rank + thread;
  ptx::cluster_arrive();
  ptx::cluster_wait();
  const uint32_t neighbour = ptx::smem_u32(s_values + (thread + 1) % 128);
  int* out = static_cast<int*>(args.p[0]) + rank * 256;
  out[thread] = ptx::ld_shared_cluster<int>(ptx::map_shared_rank(neighbour, 1 - rank));
  const uint32_t given = ptx::map_shared_rank(ptx::smem_u32(s_given + thread), 1 - rank);
  ptx::st_shared_cluster(given, 1000 + 128 * rank + thread);
  ptx::barrier_sync(1, 128);
  if (thread == 0) ptx::mbarrier_arrive_cluster(barrier, 1 - rank);
  ptx::mbarrier_wait(barrier, 0);
  ptx::cluster_arrive();
  ptx::cluster_wait();
  out[128 + thread] = s_given[thread];
#endif
}

// Threads 0 .. 127 hand numbers to the others: 0: out[t] = t. Registers move as in a warp-specialised kernel.
__global__ void __launch_bounds__(256, 1) registers_kernel(const __grid_constant__ Params args) {
#ifdef PF_SM90A
  STATIC_SMEM(int, s_values, 128);
  STATIC_SMEM(uint64_t, s_barrier, 1);
  const uint32_t barrier = ptx::smem_u32(s_barrier);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 128);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  const int thread = static_cast<int>(threadIdx.x) % 128;
  if (threadIdx.x < 128) {
    ptx::decrease_registers<40>();
    s_values[thread] = thread;
    ptx::mbarrier_arrive(barrier);
    ptx::barrier_arrive(1, 256);
  } else {
    ptx::increase_registers<248>();
    ptx::mbarrier_wait(barrier, 0);
    static_cast<int*>(args.p[0])[thread] = s_values[127 - thread];
    ptx::barrier_sync(1, 256);
  }
#endif
}

struct Case {
  const char* name;
  void (*kernel)(Params);
  int num_threads;
  unsigned cluster_size;
  size_t smem_bytes;
};

constexpr size_t kTmaBytes = kBoxBytes + 8;
constexpr size_t kWgmmaBytes = 88 * 1024;

#define WGMMA_CASES(n)                                                                                         \
  {"wgmma_" #n "_bf16_shared", wgmma_kernel<0, n / 2, false, __nv_bfloat16>, 128, 1, kWgmmaBytes},             \
      {"wgmma_" #n "_bf16_shared_trans", wgmma_kernel<1, n / 2, false, __nv_bfloat16>, 128, 1, kWgmmaBytes},   \
      {"wgmma_" #n "_bf16_registers", wgmma_kernel<0, n / 2, true, __nv_bfloat16>, 128, 1, kWgmmaBytes},       \
      {"wgmma_" #n "_bf16_registers_trans", wgmma_kernel<1, n / 2, true, __nv_bfloat16>, 128, 1, kWgmmaBytes}, \
      {"wgmma_" #n "_fp16_shared", wgmma_kernel<0, n / 2, false, __half>, 128, 1, kWgmmaBytes},                \
      {"wgmma_" #n "_fp16_shared_trans", wgmma_kernel<1, n / 2, false, __half>, 128, 1, kWgmmaBytes},          \
      {"wgmma_" #n "_fp16_registers", wgmma_kernel<0, n / 2, true, __half>, 128, 1, kWgmmaBytes}, {            \
    "wgmma_" #n "_fp16_registers_trans", wgmma_kernel<1, n / 2, true, __half>, 128, 1, kWgmmaBytes             \
  }

const Case kCases[] = {
    {"tma_load_2d", tma_load_kernel<2>, 128, 1, kTmaBytes},
    {"tma_load_3d", tma_load_kernel<3>, 128, 1, kTmaBytes},
    {"tma_load_4d", tma_load_kernel<4>, 128, 1, kTmaBytes},
    {"tma_load_multicast", tma_load_kernel<2, true>, 128, 1, kTmaBytes},
    {"tma_store_2d", tma_store_kernel<2>, 128, 1, kTmaBytes},
    {"tma_store_3d", tma_store_kernel<3>, 128, 1, kTmaBytes},
    WGMMA_CASES(64),
    WGMMA_CASES(128),
    WGMMA_CASES(192),
    WGMMA_CASES(256),
    {"stmatrix", stmatrix_kernel, 128, 1, 0},
    {"cluster", cluster_kernel, 128, 2, 0},
    {"registers", registers_kernel, 256, 1, 0},
};

}  // namespace
}  // namespace persimmon_fast::cuda

// Runs a case on one cluster and waits for it. tensor: of array 0, or null. The CUDA error, 0 if none; -1: no such
// case.
extern "C" __attribute__((visibility("default"))) int run_case(const char* name, void* const* pointers,
                                                               const persimmon_fast::cuda::TensorBox* tensor) {
  using namespace persimmon_fast::cuda;
  Params args{};
  for (int i = 0; i < 4; ++i) args.p[i] = pointers[i];
#ifdef PF_EMULATE
  emu::set_architecture(90);
#endif
  if (tensor != nullptr) {
    TensorBox box = *tensor;
    box.base = pointers[0];
    if (const cudaError_t error = encode_tensor_map(box, args.map); error != cudaSuccess) return error;
  }
  for (const Case& test : kCases) {
    if (std::strcmp(test.name, name) != 0) continue;
    const dim3 block(static_cast<unsigned>(test.num_threads));
    cudaError_t error = launch_sm90(test.name, test.kernel, test.cluster_size, block, test.cluster_size,
                                    test.smem_bytes, nullptr, args);
#ifndef PF_EMULATE
    if (error == cudaSuccess) error = cudaDeviceSynchronize();
#endif
    return error;
  }
  return -1;
}
