// Philox4x32-10: counter-based random numbers. Word i of a stream is a pure function of key and counter, so the same
// numbers come out in any order, on any device. Torch-free, for C++ and CUDA.
//
// Source: Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3 (SC'11).
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define PF_HOST_DEVICE __host__ __device__
#else
#define PF_HOST_DEVICE
#endif

namespace persimmon_fast {

struct PhiloxBlock {
  uint32_t words[4];
};

// The four words 4 * block .. 4 * block + 3 of draw `offset` of the stream `seed`: key = seed, counter = (block,
// offset, 0), low word first. As reference.philox_uniform.
PF_HOST_DEVICE inline PhiloxBlock philox(uint64_t seed, uint64_t offset, uint32_t block) {
  uint32_t c0 = block;
  uint32_t c1 = static_cast<uint32_t>(offset);
  uint32_t c2 = static_cast<uint32_t>(offset >> 32);
  uint32_t c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed);
  uint32_t k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(0xD2511F53u) * c0;
    const uint64_t product1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(product0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// A number in (0, 1), never 0 and never 1: exact in fp64.
PF_HOST_DEVICE inline double philox_to_uniform(uint32_t word) { return (word + 0.5) * 0x1p-32; }

}  // namespace persimmon_fast
