// read_memory: the xor of a region's 64-bit words
//
// Work      one region per thread, walked as kReadStreams streams that lie region / kReadStreams apart, each of them
//           contiguous, with software prefetch: one stream alone leaves a core waiting for the lines of one page
// Traffic   every byte read once, nothing written but 8 bytes
// Bound     memory, for regions far larger than the last-level cache: one xor per 64 bytes
// Numerics  integers; the checksum is there so that no load can be left out
#include "csrc/cpu/read_memory.h"

namespace persimmon_fast::cpu::PF_ISA {
namespace {

// One cache line, at any address; the compiler splits it into registers of this instruction set.
typedef uint64_t Line __attribute__((vector_size(64), aligned(1), may_alias));
constexpr int64_t kStepLines = kReadStep / static_cast<int64_t>(sizeof(Line));
static_assert(kStepLines == 4, "the loop below names four accumulators");

uint64_t read_region(const char* data, int64_t bytes) {
  Line a{}, b{}, c{}, d{};
  const int64_t stream_bytes = bytes / kReadStreams;
  for (int64_t i = 0; i < stream_bytes; i += kReadStep) {
    for (int64_t s = 0; s < kReadStreams; ++s) {
      const char* p = data + s * stream_bytes + i;
      // Beyond the end of the buffer a prefetch is dropped, it cannot fault.
      for (int64_t line = 0; line < kStepLines; ++line) __builtin_prefetch(p + kReadPrefetchAhead + line * 64);
      const Line* lines = reinterpret_cast<const Line*>(p);
      a ^= lines[0];
      b ^= lines[1];
      c ^= lines[2];
      d ^= lines[3];
    }
  }
  const Line all = (a ^ b) ^ (c ^ d);
  uint64_t checksum = 0;
  for (int lane = 0; lane < 8; ++lane) checksum ^= all[lane];
  return checksum;
}

}  // namespace

void read_memory(const ReadMemoryParams& p, int64_t begin, int64_t end) {
  for (int64_t region = begin; region < end; ++region) {
    p.checksums[region] = read_region(static_cast<const char*>(p.data) + region * p.region_bytes, p.region_bytes);
  }
}

}  // namespace persimmon_fast::cpu::PF_ISA
