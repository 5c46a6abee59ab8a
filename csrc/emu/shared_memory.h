// Shared memory: each array lies between red zones and begins as NaN, so that what is not written is not luckily zero.
#pragma once

#include "csrc/emu/scheduler.h"

namespace emu {

constexpr size_t kMaxStaticBytes = 48 * 1024;

// Fills with 0xff: NaN in fp32, fp16 and bf16, -1 in integers. By an instruction that no sanitizer sees.
EMU_RT void fill_with_nan(void* data, size_t bytes) {
  asm volatile("rep stosb" : "+D"(data), "+c"(bytes) : "a"(0xff) : "memory");
}

EMU_RT void copy_unseen(void* to, const void* from, size_t bytes) {
  asm volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(bytes) : : "memory");
}

// Addresses that kernel code must not touch, for AddressSanitizer.
EMU_RT void forbid([[maybe_unused]] const void* data, [[maybe_unused]] size_t bytes) {
#if EMU_ASAN
  __asan_poison_memory_region(data, bytes);
#endif
}
EMU_RT void allow([[maybe_unused]] const void* data, [[maybe_unused]] size_t bytes) {
#if EMU_ASAN
  __asan_unpoison_memory_region(data, bytes);
#endif
}

// The arena of a new block of threads holds no array.
EMU_RT void clear_arena(Block* block) {
  if (block->arena == nullptr) {
    block->arena = map_memory(kArenaBytes);
    EMU_CHECK(block->arena != nullptr, Site{}, "no memory for the shared memory of another block");
    block->arena_used = kArenaBytes;
  }
  forbid(block->arena, block->arena_used);
  std::memset(block->copies_in_flight, 0, block->arena_used / kGranuleBytes);
  block->arena_used = 0;
  block->num_arrays = 0;
  block->static_bytes = 0;
}

EMU_RT SharedArray* find_array(Block* block, const void* key) {
  for (int i = 0; i < block->num_arrays; ++i) {
    if (block->arrays[i].key == key) return &block->arrays[i];
  }
  return nullptr;
}

// The array of this key: of all threads of the block, the first one makes it.
EMU_RT char* shared_array(const void* key, size_t bytes, size_t alignment, Site site) {
  Block* block = self()->block;
  if (SharedArray* array = find_array(block, key)) {
    EMU_CHECK(array->bytes == bytes, site,
              "threads disagree on the layout of shared memory: %zu bytes here, %zu bytes at %s:%d", bytes,
              array->bytes, base_name(array->site.file), array->site.line);
    return array->data;
  }
  if (alignment < 16) alignment = 16;
  const size_t begin = (block->arena_used + kRedZoneBytes + alignment - 1) / alignment * alignment;
  const size_t end = (begin + bytes + kRedZoneBytes + kGranuleBytes - 1) / kGranuleBytes * kGranuleBytes;
  EMU_CHECK(end <= kArenaBytes && block->num_arrays < kMaxSharedArrays, site,
            "more shared arrays than the emulator has room for");
  fill_with_nan(block->arena + block->arena_used, end - block->arena_used);
  block->arena_used = end;
  allow(block->arena + begin, bytes);
  block->arrays[block->num_arrays++] = SharedArray{key, block->arena + begin, bytes, site};
  return block->arena + begin;
}

// Behind STATIC_SMEM.
EMU_RT void* static_shared(const void* key, size_t bytes, size_t alignment, Site site) {
  Block* block = self()->block;
  if (find_array(block, key) == nullptr) {
    block->static_bytes += bytes;
    const size_t limit = machine.config.max_shared_bytes();
    EMU_CHECK(block->static_bytes <= kMaxStaticBytes, site,
              "%zu bytes of static shared memory; at most %zu are allowed", block->static_bytes, kMaxStaticBytes);
    EMU_CHECK(block->static_bytes + block->dynamic_bytes <= limit, site,
              "%zu bytes of static and %zu bytes of dynamic shared memory; a block may use %zu", block->static_bytes,
              block->dynamic_bytes, limit);
  }
  return shared_array(key, bytes, alignment, site);
}

// Behind SMEM_CARVER: cuts dynamic shared memory into arrays. Offsets are counted as on the GPU, where no red zones lie
// between the arrays, and compared with the size that the launch gave.
class SmemCarver {
 public:
  template <class T>
  EMU_RT T* take(size_t count, size_t alignment = 16, EMU_SITE) {
    const size_t launched = self()->block->dynamic_bytes;
    offset_ = (offset_ + alignment - 1) / alignment * alignment;
    const void* key = reinterpret_cast<const void*>(offset_ + 1);  // no address of a static array is that small
    offset_ += count * sizeof(T);
    EMU_CHECK(offset_ <= launched, EMU_HERE,
              "dynamic shared memory: this array ends at byte %zu, but the launch gave %zu bytes", offset_, launched);
    return reinterpret_cast<T*>(shared_array(key, count * sizeof(T), alignment, EMU_HERE));
  }

 private:
  size_t offset_ = 0;
};

// Describes an address of the arena for an error message: the nearest array.
__attribute__((cold, no_sanitize("thread"))) inline void describe_shared(char* text, size_t size, Block* block,
                                                                         const char* address) {
  const SharedArray* nearest = nullptr;
  size_t distance = kArenaBytes;
  bool behind = false;
  for (int i = 0; i < block->num_arrays; ++i) {
    const SharedArray& array = block->arrays[i];
    const char* end = array.data + array.bytes;
    const size_t d = address < array.data ? static_cast<size_t>(array.data - address)
                     : address >= end     ? static_cast<size_t>(address - end)
                                          : 0;
    if (d >= distance && nearest != nullptr) continue;
    nearest = &array, distance = d, behind = address >= end;
  }
  if (nearest == nullptr) {
    std::snprintf(text, size, "shared memory of which the kernel has taken no array");
    return;
  }
  const char* file = base_name(nearest->site.file);
  if (address >= nearest->data && !behind) {
    std::snprintf(text, size, "byte %zu of the shared array of %zu bytes taken at %s:%d",
                  static_cast<size_t>(address - nearest->data), nearest->bytes, file, nearest->site.line);
  } else {
    std::snprintf(text, size, "%zu bytes %s the shared array of %zu bytes taken at %s:%d", distance,
                  behind ? "behind the end of" : "before the start of", nearest->bytes, file, nearest->site.line);
  }
}

EMU_RT bool is_shared(const Block* block, const void* address) {
  const char* a = static_cast<const char*>(address);
  return a >= block->arena && a < block->arena + kArenaBytes;
}

// An address of shared memory in the 32-bit form that PTX instructions take: the offset in the arena.
EMU_RT uint32_t smem_u32(const void* pointer, EMU_SITE) {
  const Block* block = self()->block;
  EMU_CHECK(is_shared(block, pointer), EMU_HERE, "smem_u32: %p is no address of the block's shared memory", pointer);
  return static_cast<uint32_t>(static_cast<const char*>(pointer) - block->arena);
}

EMU_RT uint8_t& copies_in_flight(Block* block, const char* address) {
  return block->copies_in_flight[static_cast<size_t>(address - block->arena) / kGranuleBytes];
}

[[noreturn]] __attribute__((cold, noinline, no_sanitize("thread"))) inline void fail_in_flight(Block* block,
                                                                                               const char* operation,
                                                                                               const char* address,
                                                                                               Site site) {
  char where[160];
  describe_shared(where, sizeof where, block, address);
  for (int t = 0; t < block->num_threads; ++t) {
    const CudaThread* thread = block->threads[t];
    for (int i = 0; i < thread->num_copies; ++i) {
      const AsyncCopy& copy = thread->copies[i];
      if (address + kGranuleBytes <= copy.dst || address >= copy.dst + copy.bytes) continue;
      fail(site, "%s touches data in flight: %s; cp.async of thread %d, issued at %s:%d, has not been waited for",
           operation, where, t, base_name(copy.site.file), copy.site.line);
    }
  }
  for (int i = 0; i < machine.num_bulk_copies; ++i) {
    const BulkCopy& copy = *machine.in_flight[i];
    const char* begin = block->arena + copy.shared;
    if (copy.block != block || copy.is_store || address + kGranuleBytes <= begin || address >= begin + copy.bytes) {
      continue;
    }
    fail(site, "%s touches data in flight: %s; the TMA load issued at %s:%d has not arrived", operation, where,
         base_name(copy.site.file), copy.site.line);
  }
  fail(site, "%s touches data in flight: %s", operation, where);
}

// The memory of `block` behind a shared address: aligned, and all of it in one array.
EMU_RT char* shared_range(Block* block, uint32_t address, size_t bytes, size_t alignment, const char* operation,
                          Site site) {
  EMU_CHECK(address % alignment == 0, site, "%s: shared address 0x%x is not %zu-byte aligned", operation, address,
            alignment);
  char* data = block->arena + address;
  for (int i = 0; i < block->num_arrays && address < kArenaBytes; ++i) {
    const SharedArray& array = block->arrays[i];
    if (data >= array.data && data + bytes <= array.data + array.bytes) return data;
  }
  char where[160];
  describe_shared(where, sizeof where, block, address < kArenaBytes ? data : block->arena + kArenaBytes);
  fail(site, "%s: out of bounds: %zu bytes at %s", operation, bytes, where);
}

// The same for an access of this thread, which must not meet a copy in flight.
EMU_RT char* shared_pointer(uint32_t address, size_t bytes, const char* operation, Site site) {
  Block* block = self()->block;
  char* data = shared_range(block, address, bytes, bytes, operation, site);
  if (copies_in_flight(block, data) != 0 && bytes >= kGranuleBytes) fail_in_flight(block, operation, data, site);
  return data;
}

// After a block: plain stores outside its arrays left a trace in the red zones. AddressSanitizer sees them at once.
EMU_RT void check_red_zones(Block* block) {
  if (EMU_ASAN) return;
  for (int i = 0; i < block->num_arrays; ++i) {
    const SharedArray& array = block->arrays[i];
    for (size_t k = 0; k < kRedZoneBytes; ++k) {
      const bool behind = array.data[array.bytes + k] != '\xff';
      if (!behind && *(array.data - 1 - k) == '\xff') continue;
      const uint3 index = block->index;
      fail(array.site, "out of bounds: block (%u,%u,%u) wrote %zu bytes %s the shared array of %zu bytes taken",
           index.x, index.y, index.z, behind ? k : k + 1, behind ? "behind the end of" : "before the start of",
           array.bytes);
    }
  }
}

}  // namespace emu

#define SMEM_CARVER(name) ::emu::SmemCarver name
#define STATIC_SMEM(T, name, n) \
  static char name##_key;       \
  T* name = static_cast<T*>(::emu::static_shared(&name##_key, sizeof(T) * (n), alignof(T), {__FILE__, __LINE__}))
