// A ring of stages in shared memory, each with an mbarrier that says full and one that says empty.
#pragma once

#include "csrc/cuda/device.cuh"

namespace persimmon_fast::cuda {

// Where one side of a ring stands. full[stage] is waited for with `parity`, empty[stage] with its opposite: a fresh
// barrier lets pass who waits for the phase before its first.
template <int kStages>
struct RingPosition {
  int stage = 0;
  int parity = 0;  // of the lap

  DEV int previous() const { return stage == 0 ? kStages - 1 : stage - 1; }
  DEV void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

}  // namespace persimmon_fast::cuda
