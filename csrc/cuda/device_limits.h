// What the current device allows a launch.
#pragma once

#include <driver_types.h>

#include <cstddef>

namespace persimmon_fast::cuda {

struct DeviceLimits {
  size_t smem_per_block;  // dynamic, if the kernel asks
  size_t smem_per_multiprocessor;
  bool launches_dependents;  // programmatic dependent launch
  bool runs_sm90a;           // kernels with wgmma and TMA: compute capability 9.0, and they are in this build
};

// Asked once per device.
cudaError_t device_limits(DeviceLimits& limits);

}  // namespace persimmon_fast::cuda
