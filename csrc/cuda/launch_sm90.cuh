// Launches of kernels for sm_90a.
#pragma once

#include "csrc/cuda/device.cuh"

namespace persimmon_fast::cuda {

constexpr size_t kMaxSmemBytesSm90 = 227 * 1024;  // that a block may use

// Whether *_sm90.cu is in this build. Calls into it stand behind `if constexpr`.
#if defined(PF_BUILT_SM90A) || defined(PF_EMULATE)
constexpr bool kBuiltSm90a = true;
#else
constexpr bool kBuiltSm90a = false;
#endif

// As launch(). cluster_size: consecutive blocks that run at the same time and reach each other's shared memory; divides
// grid.x.
template <typename Params>
cudaError_t launch_sm90(const char* name, void (*kernel)(Params), dim3 grid, dim3 block, unsigned cluster_size,
                        size_t smem_bytes, cudaStream_t stream, const Params& params) {
#ifdef PF_EMULATE
  static_cast<void>(stream);
  emu::launch_cluster_named(name, kernel, grid, block, cluster_size, smem_bytes, params);
  return cudaSuccess;
#else
  static_cast<void>(name);
  if (const cudaError_t error = allow_smem(kernel, smem_bytes); error != cudaSuccess) return error;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster_size;
  attribute.val.clusterDim.y = 1;
  attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = smem_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, params);
#endif
}

}  // namespace persimmon_fast::cuda
