// cp.async: copies from global to shared memory that end no later than the wait for their group.
#pragma once

#include "csrc/emu/shared_memory.h"

namespace emu {

EMU_RT void finish_copy(const AsyncCopy& copy, Block* block) {
  allow(copy.dst, copy.bytes);
  hb_write(copy.dst, copy.bytes);
  hb_read(copy.src, copy.valid_bytes);
  for (uint32_t i = 0; i < copy.bytes; i += 4) {
    uint32_t word = 0;
    if (i < copy.valid_bytes) {  // the valid part may end within the word
      const uint32_t count = copy.valid_bytes - i < 4 ? copy.valid_bytes - i : 4;
      for (uint32_t k = 0; k < count; ++k) word |= uint32_t{static_cast<uint8_t>(copy.src[i + k])} << 8 * k;
    }
    __builtin_memcpy(copy.dst + i, &word, 4);
  }
  --copies_in_flight(block, copy.dst);
}

// cp.async of 4, 8 or 16 bytes, of which those from valid_bytes on become zero and are not read.
EMU_RT void cp_async(uint32_t dst, const void* src, uint32_t bytes, uint32_t valid_bytes, Site site) {
  CudaThread* thread = self();
  Block* block = thread->block;
  EMU_CHECK(bytes == 4 || bytes == 8 || bytes == 16, site, "cp.async: %u bytes; it copies 4, 8 or 16", bytes);
  EMU_CHECK(valid_bytes <= bytes, site, "cp.async: %u valid bytes of %u", valid_bytes, bytes);
  EMU_CHECK(reinterpret_cast<uintptr_t>(src) % bytes == 0, site, "cp.async: global address %p is not %u-byte aligned",
            src, bytes);
#if EMU_ASAN
  if (valid_bytes != 0 && __asan_region_is_poisoned(const_cast<void*>(src), valid_bytes) != nullptr) {
    fail(site, "cp.async: out of bounds: %u bytes of global memory at %p", valid_bytes, src);
  }
#endif
  EMU_CHECK(thread->num_copies < kMaxCopiesPerThread, site, "cp.async: more than %d copies of one thread in flight",
            kMaxCopiesPerThread);
  char* data = shared_pointer(dst, bytes, "cp.async", site);
  ++copies_in_flight(block, data);
  const AsyncCopy copy{data, static_cast<const char*>(src), bytes, valid_bytes, thread->num_groups, site};
  if (machine.config.async == AsyncPolicy::kEarly) return finish_copy(copy, block);
  hb_write(data, bytes);  // readers of the old content must have finished by now, not only at the wait
  fill_with_nan(data, bytes);
  forbid(data, bytes);
  thread->copies[thread->num_copies++] = copy;
}

EMU_RT void cp_async_commit() { ++self()->num_groups; }

// Until at most the `pending` groups that this thread committed last are in flight.
EMU_RT void cp_async_wait(int pending) {
  CudaThread* thread = self();
  int kept = 0;
  for (int i = 0; i < thread->num_copies; ++i) {
    const AsyncCopy copy = thread->copies[i];
    if (copy.group < thread->num_groups - pending) {
      finish_copy(copy, thread->block);
    } else {
      thread->copies[kept++] = copy;
    }
  }
  thread->num_copies = kept;
}

EMU_RT void finish_any_copy() {
  CudaThread* thread = self();
  if (thread->num_copies == 0 || random_number() % 4 != 0) return;
  const int i = static_cast<int>(random_number() % static_cast<unsigned>(thread->num_copies));
  finish_copy(thread->copies[i], thread->block);
  thread->copies[i] = thread->copies[--thread->num_copies];
}

}  // namespace emu
