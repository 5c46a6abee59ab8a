// read_memory: one region per thread.
#include "csrc/ops/read_memory.h"

#include <ATen/Parallel.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "csrc/cpu/read_memory.h"

namespace persimmon_fast {

int64_t read_memory(uintptr_t address, int64_t num_bytes) {
  const int64_t threads = at::get_num_threads();
  const int64_t region_bytes = num_bytes / threads / cpu::kReadGranule * cpu::kReadGranule;
  if (region_bytes <= 0) {
    throw std::invalid_argument("read_memory: expected bytes >= " + std::to_string(threads * cpu::kReadGranule) + " (" +
                                std::to_string(cpu::kReadGranule) + " for each of " + std::to_string(threads) +
                                " threads), got " + std::to_string(num_bytes));
  }
  std::vector<uint64_t> checksums(threads);
  const cpu::ReadMemoryParams params{reinterpret_cast<const void*>(address), checksums.data(), region_bytes};
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) { cpu::read_memory(params, begin, end); });
  return region_bytes * threads;
}

}  // namespace persimmon_fast
