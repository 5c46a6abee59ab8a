// Reductions over neighbouring lanes of a warp, by butterfly exchange.
#pragma once

#include "csrc/cuda/device.cuh"

namespace persimmon_fast::cuda {

// Over groups of kLanes neighbouring lanes; all lanes of the warp call, and each gets the result of its group. Where
// `combine` commutes bitwise, all get the same bits: each step combines the same two values in both partners.
template <int kLanes, typename T, typename Combine>
DEV T reduce_lanes(T value, Combine combine) {
#pragma unroll
  for (int lane_mask = kLanes / 2; lane_mask > 0; lane_mask /= 2) {
    value = combine(value, __shfl_xor_sync(kFullMask, value, lane_mask));
  }
  return value;
}

template <int kLanes = kWarpSize, typename T>
DEV T sum_lanes(T value) {
  return reduce_lanes<kLanes>(value, [](T a, T b) { return a + b; });
}

}  // namespace persimmon_fast::cuda
