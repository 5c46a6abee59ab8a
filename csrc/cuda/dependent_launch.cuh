// Programmatic dependent launch (compute capability 9.0 and newer): a kernel starts while its predecessor in the stream
// ends, and does what depends on nothing, here: it orders its first weights.
//
// A kernel that is launched by launch_dependent calls, in every thread,
//   ptx::launch_dependents()      as soon as its own successor may start: at once
//   ptx::wait_for_predecessors()  before it reads what a kernel wrote, and before it writes anything: when it returns,
//                                 all kernels before this one are done, so nobody reads any more what it overwrites
//
// Before the wait it may read only what no kernel of the chain writes. Weights are such a thing while tokens are
// generated, but not right after an optimizer's step. So the caller says when: dependent_launches() is false until a
// decode step is captured.
#pragma once

#include "csrc/cuda/dependent_launch.h"
#include "csrc/cuda/device.cuh"
#include "csrc/cuda/device_limits.h"

namespace persimmon_fast::cuda {

// As launch().
template <typename Params>
cudaError_t launch_dependent(const char* name, void (*kernel)(Params), dim3 grid, dim3 block, size_t smem_bytes,
                             cudaStream_t stream, const Params& params) {
  DeviceLimits limits;
  if (const cudaError_t error = device_limits(limits); error != cudaSuccess) return error;
  if (!dependent_launches() || !limits.launches_dependents) {
    return launch(name, kernel, grid, block, smem_bytes, stream, params);
  }
#ifdef PF_EMULATE
  static_cast<void>(stream);
  emu::launch_dependent_named(name, kernel, grid, block, smem_bytes, params);
  return cudaSuccess;
#else
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  return AttributedLaunch(kernel, grid, block, smem_bytes, stream, attribute).run(kernel, params);
#endif
}

}  // namespace persimmon_fast::cuda
