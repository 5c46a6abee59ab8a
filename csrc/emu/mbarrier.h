// mbarrier: barriers in shared memory that count arrivals of threads and bytes of TMA. PTX ISA, "mbarrier".
#pragma once

#include "csrc/emu/async_proxy.h"

namespace emu {

constexpr const char* kMbarrierWait = "mbarrier.try_wait";
constexpr int kMaxMbarrierCount = (1 << 15) - 1;
constexpr int kMaxMbarrierBytes = (1 << 20) - 1;  // announced and not arrived

// The state lies in the barrier's 8 bytes: a kernel that overwrites them, or forgets the init, is found.
struct MbarrierWord {
  static constexpr uint64_t kMagic = 0x2b5;
  uint64_t phase : 1;
  uint64_t pending : 15;  // arrivals
  uint64_t count : 15;
  uint64_t magic : 11;
  int64_t bytes : 22;
};
static_assert(sizeof(MbarrierWord) == 8);

EMU_RT MbarrierWord load_mbarrier(const Block* block, uint32_t address) {
  MbarrierWord word;
  __builtin_memcpy(&word, block->arena + address, sizeof word);
  return word;
}

EMU_RT Mbarrier& find_mbarrier(Block* block, uint32_t address, const char* operation, Site site) {
  shared_range(block, address, 8, 8, operation, site);
  for (int i = 0; i < block->num_mbarriers; ++i) {
    Mbarrier& barrier = block->mbarriers[i];
    if (barrier.address != address) continue;
    EMU_CHECK(load_mbarrier(block, address).magic == MbarrierWord::kMagic, site,
              "%s: the mbarrier initialised at %s:%d was overwritten", operation, base_name(barrier.site.file),
              barrier.site.line);
    // To ThreadSanitizer the init writes and all other operations read.
    hb_read(block->arena + address, 8);
    check_access(site);
    return barrier;
  }
  fail(site, "%s: the mbarrier at shared address 0x%x is not initialised", operation, address);
}

EMU_RT void mbarrier_init(uint32_t address, int count, Site site) {
  Block* block = self()->block;
  char* data = shared_range(block, address, 8, 8, "mbarrier.init", site);
  EMU_CHECK(count > 0 && count <= kMaxMbarrierCount, site, "mbarrier.init: count %d; 1 to %d are allowed here", count,
            kMaxMbarrierCount);
  for (int i = 0; i < block->num_mbarriers; ++i) {
    EMU_CHECK(block->mbarriers[i].address != address, site, "mbarrier.init: already initialised at %s:%d",
              base_name(block->mbarriers[i].site.file), block->mbarriers[i].site.line);
  }
  EMU_CHECK(block->num_mbarriers < kMaxMbarriers, site, "more than %d mbarriers in a block", kMaxMbarriers);
  Mbarrier& barrier = block->mbarriers[block->num_mbarriers++];
  barrier.address = address;
  barrier.is_visible = false;
  barrier.initialiser = self();
  barrier.site = site;
  barrier.waiting = WaitList{};
  hb_write(data, 8);
  const auto number = static_cast<uint64_t>(count) & kMaxMbarrierCount;
  const MbarrierWord word{0, number, number, MbarrierWord::kMagic, 0};
  __builtin_memcpy(data, &word, sizeof word);
}

// Counts `arrivals` and bytes: announced ones are positive, those that have come negative.
EMU_RT void update_mbarrier(Block* block, Mbarrier& barrier, unsigned arrivals, int bytes, const char* operation,
                            Site site) {
  MbarrierWord word = load_mbarrier(block, barrier.address);
  EMU_CHECK(word.pending >= arrivals, site,
            "%s: more arrivals on the mbarrier (initialised at %s:%d) than its count, %d, in a phase that waits for "
            "%d bytes",
            operation, base_name(barrier.site.file), barrier.site.line, static_cast<int>(word.count),
            static_cast<int>(word.bytes));
  hb_release(&barrier.token[word.phase]);
  const int sum = static_cast<int>(word.bytes) + bytes;
  EMU_CHECK(sum >= -kMaxMbarrierBytes && sum <= kMaxMbarrierBytes, site,
            "%s: %d bytes pending on the mbarrier (initialised at %s:%d); at most %d", operation, sum,
            base_name(barrier.site.file), barrier.site.line, kMaxMbarrierBytes);
  word.bytes = sum;
  word.pending = (word.pending - arrivals) & kMaxMbarrierCount;
  EMU_CHECK(word.pending != 0 || sum >= 0, site,
            "%s: %d bytes more than were announced have arrived on the mbarrier (initialised at %s:%d)", operation,
            -sum, base_name(barrier.site.file), barrier.site.line);
  if (word.pending == 0 && sum == 0) {
    word.phase ^= 1;
    word.pending = word.count;
    note_progress();
    wake_all(barrier.waiting);
  }
  __builtin_memcpy(block->arena + barrier.address, &word, sizeof word);
}

EMU_RT void mbarrier_arrive(uint32_t address, Site site) {
  Block* block = self()->block;
  update_mbarrier(block, find_mbarrier(block, address, "mbarrier.arrive", site), 1, 0, "mbarrier.arrive", site);
}

EMU_RT void mbarrier_arrive_expect_tx(uint32_t address, int bytes, Site site) {
  const char* operation = "mbarrier.arrive.expect_tx";
  Block* block = self()->block;
  EMU_CHECK(bytes >= 0 && bytes <= kMaxMbarrierBytes, site, "%s: %d bytes; at most %d", operation, bytes,
            kMaxMbarrierBytes);
  update_mbarrier(block, find_mbarrier(block, address, operation, site), 1, bytes, operation, site);
}

// mbarrier.try_wait.parity in a loop: until the phase of this parity is complete.
EMU_RT void mbarrier_wait(uint32_t address, int parity, Site site) {
  EMU_CHECK(parity == 0 || parity == 1, site, "mbarrier.try_wait: parity %d; it is 0 or 1", parity);
  CudaThread* thread = self();
  Mbarrier& barrier = find_mbarrier(thread->block, address, kMbarrierWait, site);
  while (load_mbarrier(thread->block, address).phase == static_cast<unsigned>(parity)) {
    thread->mbarrier = address;
    block_in(barrier.waiting, kMbarrierWait, site);
  }
  hb_acquire(&barrier.token[parity]);
}

// What a thread waits for that waits in mbarrier_wait, for the report of a deadlock.
__attribute__((cold, no_sanitize("thread"))) inline void describe_mbarrier(char* text, size_t size,
                                                                           const CudaThread* thread) {
  const MbarrierWord word = load_mbarrier(thread->block, thread->mbarrier);
  std::snprintf(text, size, " (phase %d: %d of %d arrivals and %d bytes are missing)", static_cast<int>(word.phase),
                static_cast<int>(word.pending), static_cast<int>(word.count), static_cast<int>(word.bytes));
}

}  // namespace emu
