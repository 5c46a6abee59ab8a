// Asks the system to back memory with huge pages. No op: Python calls it through _C.
#pragma once

#include <cstdint>

namespace persimmon_fast {

// All pages that num_bytes bytes at `address` touch. A wish: does nothing where the system has no such pages, and what
// has already been touched stays as it is. The caller answers for the address.
void advise_huge_pages(uintptr_t address, int64_t num_bytes);

}  // namespace persimmon_fast
