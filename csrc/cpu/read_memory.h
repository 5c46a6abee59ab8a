// Reading memory and doing nothing else: the limit that decode kernels are compared with. See read_memory.cpp.
#pragma once

#include <cstdint>

#include "csrc/cpu/isa.h"

namespace persimmon_fast::cpu {

constexpr int64_t kReadStreams = 8;           // addresses that a thread walks at the same time
constexpr int64_t kReadStep = 256;            // bytes that it takes of one before it turns to the next
constexpr int64_t kReadPrefetchAhead = 2048;  // bytes
constexpr int64_t kReadGranule = kReadStreams * kReadStep;

struct ReadMemoryParams {
  const void* data;      // regions one after the other
  uint64_t* checksums;   // [number of regions], written: the xor of the region's words
  int64_t region_bytes;  // a multiple of kReadGranule
};

// Work items: regions, one per thread.
PF_CPU_KERNEL(read_memory, ReadMemoryParams)

}  // namespace persimmon_fast::cpu
