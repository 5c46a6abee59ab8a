// One kernel per wrapper of csrc/cuda/ptx.cuh, for test_ptx_wrappers.py: compiled by g++ for the emulator and by nvcc
// for a GPU, to show that both do the same.
#include "csrc/cuda/ptx.cuh"

#include <cstring>

namespace persimmon_fast::cuda {
namespace {

struct Pointers {
  void* p[4];
};

// 0, 1: operands as they lie in registers, [lane][word]; 2: sums to add to, overwritten.
template <typename scalar_t>
__global__ void mma_kernel(Pointers args) {
  const int lane = threadIdx.x;
  uint32_t a[4];
  uint32_t b[2];
  float d[4];
  for (int i = 0; i < 4; ++i) a[i] = static_cast<uint32_t*>(args.p[0])[lane * 4 + i];
  for (int i = 0; i < 2; ++i) b[i] = static_cast<uint32_t*>(args.p[1])[lane * 2 + i];
  for (int i = 0; i < 4; ++i) d[i] = static_cast<float*>(args.p[2])[lane * 4 + i];
  ptx::mma(d, a, b, scalar_t{});
  for (int i = 0; i < 4; ++i) static_cast<float*>(args.p[2])[lane * 4 + i] = d[i];
}

// 0: matrices, row after row; 1: what lane l receives, [l][word].
template <int kMatrices, bool kTrans>
__global__ void ldmatrix_kernel(Pointers args) {
  STATIC_SMEM(uint4, s_rows, kMatrices * 8);
  const int lane = threadIdx.x;
  if (lane < kMatrices * 8) s_rows[lane] = static_cast<uint4*>(args.p[0])[lane];
  __syncthreads();
  uint32_t r[kMatrices];
  const uint32_t address = ptx::smem_u32(s_rows + lane % (kMatrices * 8));
  if constexpr (kTrans) {
    ptx::ldmatrix_trans(r, address);
  } else {
    ptx::ldmatrix(r, address);
  }
  for (int i = 0; i < kMatrices; ++i) static_cast<uint32_t*>(args.p[1])[lane * kMatrices + i] = r[i];
}

// 0: 33 chunks of 16 bytes, of which lane l copies chunk l twice: first l % 17 bytes of it, then, in a group of its
// own, all; 1, 2: what arrived.
template <bool kOnce>
__global__ void cp_async_kernel(Pointers args) {
  STATIC_SMEM(uint4, s_first, 32);
  STATIC_SMEM(uint4, s_second, 32);
  const int lane = threadIdx.x;
  const uint4* g_chunk = static_cast<uint4*>(args.p[0]) + lane;
  const auto copy = [&](uint4* s_chunk, int valid_bytes) {
    if constexpr (kOnce) {
      ptx::cp_async16_once(ptx::smem_u32(s_chunk), g_chunk, valid_bytes, ptx::evict_first_policy());
    } else {
      ptx::cp_async16(ptx::smem_u32(s_chunk), g_chunk, valid_bytes);
    }
  };
  copy(s_first + lane, lane % 17);
  ptx::cp_async_commit();
  copy(s_second + lane, 16);
  ptx::cp_async_commit();
  ptx::cp_async_wait<1>();
  static_cast<uint4*>(args.p[1])[lane] = s_first[lane];
  ptx::cp_async_wait<0>();
  static_cast<uint4*>(args.p[2])[lane] = s_second[lane];
}

// 0: 32 numbers; 1: 2 to their power.
__global__ void exp2_kernel(Pointers args) {
  static_cast<float*>(args.p[1])[threadIdx.x] = ptx::exp2_approx(static_cast<float*>(args.p[0])[threadIdx.x]);
}

struct Case {
  const char* name;
  void (*kernel)(Pointers);
};

const Case kCases[] = {
    {"mma_bf16", mma_kernel<__nv_bfloat16>},
    {"mma_fp16", mma_kernel<__half>},
    {"ldmatrix_x2", ldmatrix_kernel<2, false>},
    {"ldmatrix_x4", ldmatrix_kernel<4, false>},
    {"ldmatrix_x2_trans", ldmatrix_kernel<2, true>},
    {"ldmatrix_x4_trans", ldmatrix_kernel<4, true>},
    {"cp_async", cp_async_kernel<false>},
    {"cp_async_once", cp_async_kernel<true>},
    {"exp2", exp2_kernel},
};

}  // namespace
}  // namespace persimmon_fast::cuda

// Runs a case with one warp and waits for it. The CUDA error, 0 if none; -1: no such case.
extern "C" __attribute__((visibility("default"))) int run_case(const char* name, void* const* pointers) {
  using namespace persimmon_fast::cuda;
  Pointers args;
  for (int i = 0; i < 4; ++i) args.p[i] = pointers[i];
  for (const Case& test : kCases) {
    if (std::strcmp(test.name, name) != 0) continue;
    cudaError_t error = launch(test.name, test.kernel, 1, 32, 0, nullptr, args);
#ifndef PF_EMULATE
    if (error == cudaSuccess) error = cudaDeviceSynchronize();
#endif
    return error;
  }
  return -1;
}
