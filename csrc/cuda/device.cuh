// Where a kernel runs: on a GPU through nvcc, or on a CPU through csrc/emu, from the same source.
//
// Rules that keep both possible: assembly only in ptx.cuh, shared memory only through SMEM_CARVER (dynamic) and
// STATIC_SMEM, launches only through launch(), one Params struct per kernel. No torch header here or below.
#pragma once

#include <cstddef>
#include <cstdint>

#include "csrc/common/ceil_div.h"

#ifdef PF_EMULATE

#include <driver_types.h>  // cudaError_t, cudaStream_t

#include "csrc/emu/cuda_on_cpu.h"

#define DEV inline

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define DEV __device__ __forceinline__
#define STATIC_SMEM(T, name, n) __shared__ T name[n]
// Cuts the dynamic shared memory of a launch into arrays: SMEM_CARVER(smem); float* a = smem.take<float>(n, alignment);
#define SMEM_CARVER(name)                                         \
  extern __shared__ __align__(1024) unsigned char name##_bytes[]; \
  persimmon_fast::cuda::SmemCarver name(name##_bytes)

#endif

namespace persimmon_fast::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kFullMask = 0xffffffffu;
// What a block may use on every GPU from sm_80 on: sm_86 and sm_89 give the least.
constexpr size_t kMaxSmemBytes = 99 * 1024;

// A value that is the same in all lanes of a warp, so that the compiler knows it.
DEV int uniform(int value) { return __shfl_sync(kFullMask, value, 0); }

#ifndef PF_EMULATE
class SmemCarver {
 public:
  DEV explicit SmemCarver(unsigned char* base) : base_(base) {}

  // `count` elements of T at the next multiple of `alignment` bytes.
  template <typename T>
  DEV T* take(size_t count, size_t alignment = 16) {
    offset_ = (offset_ + alignment - 1) / alignment * alignment;
    T* array = reinterpret_cast<T*>(base_ + offset_);
    offset_ += count * sizeof(T);
    return array;
  }

 private:
  unsigned char* base_;
  size_t offset_ = 0;
};
#endif

#ifndef PF_EMULATE
// Beyond 48 KB a kernel must ask.
template <typename Params>
cudaError_t allow_smem(void (*kernel)(Params), size_t smem_bytes) {
  if (smem_bytes <= 48 * 1024) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(smem_bytes));
}
#endif

#ifndef PF_EMULATE
// A launch with one attribute, for cudaLaunchKernelEx; `config` points to the attribute.
struct AttributedLaunch {
  template <typename Params>
  AttributedLaunch(void (*kernel)(Params), dim3 grid, dim3 block, size_t smem_bytes, cudaStream_t stream,
                   const cudaLaunchAttribute& launch_attribute)
      : error(allow_smem(kernel, smem_bytes)), attribute(launch_attribute) {
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = smem_bytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  AttributedLaunch(const AttributedLaunch&) = delete;

  template <typename Params>
  cudaError_t run(void (*kernel)(Params), const Params& params) const {
    return error != cudaSuccess ? error : cudaLaunchKernelEx(&config, kernel, params);
  }

  cudaError_t error;
  cudaLaunchAttribute attribute;
  cudaLaunchConfig_t config{};
};
#endif

// Enqueues kernel(params). name: for messages. Neither allocates nor synchronises; returns the launch's error.
template <typename Params>
cudaError_t launch(const char* name, void (*kernel)(Params), dim3 grid, dim3 block, size_t smem_bytes,
                   cudaStream_t stream, const Params& params) {
#ifdef PF_EMULATE
  static_cast<void>(stream);
  emu::launch_named(name, kernel, grid, block, smem_bytes, params);  // throws on every fault that it finds
  return cudaSuccess;
#else
  static_cast<void>(name);
  if (const cudaError_t error = allow_smem(kernel, smem_bytes); error != cudaSuccess) return error;
  void* arguments[] = {const_cast<Params*>(&params)};
  return cudaLaunchKernel(kernel, grid, block, arguments, smem_bytes, stream);
#endif
}

}  // namespace persimmon_fast::cuda
