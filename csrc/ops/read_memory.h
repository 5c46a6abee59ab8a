// Reads memory with all threads and does nothing else, for measurements of bandwidth. No op: Python calls it through
// _C.
#pragma once

#include <cstdint>

namespace persimmon_fast {

// Reads num_bytes bytes at `address` once, rounded down to whole steps of all threads of torch's pool, and returns how
// many were read. The caller answers for the address. Throws std::invalid_argument where that is no step at all.
int64_t read_memory(uintptr_t address, int64_t num_bytes);

}  // namespace persimmon_fast
