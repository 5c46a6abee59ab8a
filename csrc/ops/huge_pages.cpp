// advise_huge_pages: madvise, where there is one.
#include "csrc/ops/huge_pages.h"

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace persimmon_fast {

void advise_huge_pages([[maybe_unused]] uintptr_t address, [[maybe_unused]] int64_t num_bytes) {
#ifdef MADV_HUGEPAGE
  const auto page_size = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = address / page_size * page_size;
  // The answer is not looked at: a kernel without huge pages is no error.
  if (num_bytes > 0) madvise(reinterpret_cast<void*>(begin), address + num_bytes - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace persimmon_fast
