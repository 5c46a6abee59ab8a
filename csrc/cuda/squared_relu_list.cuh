// The list of active neurons: each block makes the part that it needs, from the masks (DownScratch).
#pragma once

#include "csrc/cuda/device.cuh"

namespace persimmon_fast::cuda {

constexpr int kListThreads = 256;  // of the block
constexpr int kListWarps = kListThreads / kWarpSize;

// The list of active neurons, of which a block takes a part: positions [begin, begin + length) in ascending order.
// Each thread counts a group of masks; s_start[t]: the position at which the neurons of thread t's group start.
struct NeuronList {
  const uint32_t* active;
  const int* s_start;
  int num_masks;
  int masks_per_group;
  int begin;
  int length;

  // Writes the neurons at positions [first, first + kSegment) of the part; -1 behind its end. All threads.
  template <int kSegment, int kRing>
  DEV void write(int* s_ring, int first) const {
    if (first >= length) return;
    int* s_list = s_ring + first % kRing;
    const int lane = threadIdx.x % kWarpSize;
    const int count = min(length - first, kSegment);
    const int from = begin + first;
    // The last group that starts at or before `from` holds it: 32 groups of 8, then the 8.
    const int block = __popc(__ballot_sync(kFullMask, s_start[lane * (kListThreads / kWarpSize)] <= from)) - 1;
    const int place = block * (kListThreads / kWarpSize) + lane % (kListThreads / kWarpSize);
    const int first_group =
        block * (kListThreads / kWarpSize) +
        __popc(__ballot_sync(kFullMask, lane < kListThreads / kWarpSize && s_start[place] <= from)) - 1;
    for (int group = first_group + threadIdx.x / kWarpSize; group < kListThreads && s_start[group] < from + count;
         group += kListWarps) {
      int position = s_start[group] - from;
      const int end = min((group + 1) * masks_per_group, num_masks);
      for (int mask_idx = group * masks_per_group; mask_idx < end; ++mask_idx) {
        const uint32_t mask = active[mask_idx];
        const int at = position + __popc(mask & ((1u << lane) - 1));
        if ((mask >> lane & 1u) != 0 && at >= 0 && at < count) s_list[at] = mask_idx * kWarpSize + lane;
        position += __popc(mask);
      }
    }
    for (int i = count + threadIdx.x; i < kSegment; i += kListThreads) s_list[i] = -1;
  }
};

// Counts the active neurons of all masks: s_start (see NeuronList), and the total. s_warp: [kListWarps] scratch.
DEV int count_active(const uint32_t* active, int num_masks, int masks_per_group, int* s_start, int* s_warp) {
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  int count = 0;
  const int end = min((static_cast<int>(threadIdx.x) + 1) * masks_per_group, num_masks);
  for (int i = threadIdx.x * masks_per_group; i < end; ++i) count += __popc(active[i]);
  int inclusive = count;
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const int other = __shfl_up_sync(kFullMask, inclusive, distance);
    if (lane >= distance) inclusive += other;
  }
  if (lane == kWarpSize - 1) s_warp[warp] = inclusive;
  __syncthreads();
  int before = 0;
  int total = 0;
#pragma unroll
  for (int w = 0; w < kListWarps; ++w) {
    if (w < warp) before += s_warp[w];
    total += s_warp[w];
  }
  s_start[threadIdx.x] = before + inclusive - count;
  return total;
}

}  // namespace persimmon_fast::cuda
