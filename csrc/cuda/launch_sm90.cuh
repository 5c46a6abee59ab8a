// Launches of kernels for sm_90a.
#pragma once

#include "csrc/cuda/device.cuh"

namespace persimmon_fast::cuda {

constexpr size_t kMaxSmemBytesSm90 = 227 * 1024;  // that a block may use

// Whether the kernels for sm_90a are in this build: elsewhere their bodies are empty.
#if defined(PF_BUILT_SM90A) || defined(PF_EMULATE)
constexpr bool kBuiltSm90a = true;
#else
constexpr bool kBuiltSm90a = false;
#endif

#ifndef PF_EMULATE
inline cudaLaunchAttribute cluster_attribute(unsigned cluster_size) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster_size;
  attribute.val.clusterDim.y = 1;
  attribute.val.clusterDim.z = 1;
  return attribute;
}
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
  return AttributedLaunch(kernel, grid, block, smem_bytes, stream, cluster_attribute(cluster_size)).run(kernel, params);
#endif
}

}  // namespace persimmon_fast::cuda
