// Whether kernels may start before their predecessors end. See dependent_launch.cuh.
#pragma once

namespace persimmon_fast::cuda {

// Of launches by this thread, as long as it is true: nothing but the kernels of one decode step, each of which reads
// weights that none of them writes.
inline bool& dependent_launches() {
  thread_local bool allowed = false;
  return allowed;
}

}  // namespace persimmon_fast::cuda
