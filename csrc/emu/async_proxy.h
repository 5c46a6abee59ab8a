// The asynchronous proxy, by which TMA and wgmma access shared memory. To ThreadSanitizer it is threads of its own:
// what a CUDA thread stores is ordered before what the proxy reads only by fence.proxy.async.
#pragma once

#include "csrc/emu/shared_memory.h"

namespace emu {

#if EMU_TSAN

// Fibers of TMA, taken in turns: they live as long as a launch, as they know of all that they have copied.
constexpr int kNumTmaFibers = 16;
struct TmaFibers {
  void* fiber[kNumTmaFibers] = {};
  unsigned next = 0;
};
EMU_STATE TmaFibers tma_fibers;

EMU_RT void* enter_fiber(void* fiber) {
  void* caller = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(fiber, __tsan_switch_to_fiber_no_sync);
  return caller;
}
EMU_RT void leave_fiber(void* caller) { __tsan_switch_to_fiber(caller, __tsan_switch_to_fiber_no_sync); }

// The fiber knows from now on of what the current one knows of.
EMU_RT void tell_fiber(void* fiber) {
  void* caller = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(fiber, 0);
  leave_fiber(caller);
}

EMU_RT void release_as(void* fiber, Block* block) {
  if (fiber == nullptr) return;
  void* caller = enter_fiber(fiber);
  hb_release(&machine.done_token);
  hb_release(&block->order_token[block->num_started % 2]);
  leave_fiber(caller);
}

// A fiber for a copy. It knows of what the thread knows of that issues it. To be called by that thread: ThreadSanitizer
// sees the name being written to its stack.
EMU_RT void* take_tma_fiber(Site site) {
  void*& fiber = tma_fibers.fiber[tma_fibers.next++ % kNumTmaFibers];
  if (fiber == nullptr) fiber = create_tsan_fiber();
  char name[64];
  std::snprintf(name, sizeof name, "TMA (issued at %s:%d)", base_name(site.file), site.line);
  __tsan_set_fiber_name(fiber, name);
  tell_fiber(fiber);
  return fiber;
}

// At the end of a launch. What its copies did lies before everything that follows, also where nobody waited for them.
EMU_RT void end_proxies() {
  for (Block* block : machine.resident) release_as(block->proxy_fiber, block);
  for (void*& fiber : tma_fibers.fiber) {
    if (fiber == nullptr) continue;
    for (Block* block : machine.resident) release_as(fiber, block);
    __tsan_destroy_fiber(fiber);
    fiber = nullptr;
  }
}

// The fiber by which a block's shared memory is read. It sees what was fenced before this moment.
EMU_RT void* enter_proxy(Block* block, const char* reader, Site site) {
  if (block->proxy_fiber == nullptr) block->proxy_fiber = create_tsan_fiber();
  char name[64];
  std::snprintf(name, sizeof name, "the async proxy (%s at %s:%d)", reader, base_name(site.file), site.line);
  __tsan_set_fiber_name(block->proxy_fiber, name);
  void* caller = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(block->proxy_fiber, __tsan_switch_to_fiber_no_sync);
  hb_acquire(&block->proxy_token);
  hb_acquire(&block->order_token[(block->num_started - 1) % 2]);  // as every thread of the block
  return caller;
}

#else

EMU_RT void tell_fiber(void*) {}
EMU_RT void* take_tma_fiber(Site) { return nullptr; }
EMU_RT void end_proxies() {}
EMU_RT void* enter_proxy(Block*, const char*, Site) { return nullptr; }
EMU_RT void* enter_fiber(void*) { return nullptr; }
EMU_RT void leave_fiber(void*) {}

#endif

// fence.mbarrier_init, and part of fence.proxy.async: TMA and the cluster see the mbarriers that this thread has made.
EMU_RT void fence_mbarrier_init() {
  Block* block = self()->block;
  for (int i = 0; i < block->num_mbarriers; ++i) {
    Mbarrier& barrier = block->mbarriers[i];
    if (barrier.initialiser == self()) barrier.is_visible = true;
  }
}

// fence.proxy.async: what this thread wrote, or knows to be written, before what TMA and wgmma read from here on.
EMU_RT void fence_proxy_async() {
  fence_mbarrier_init();
  hb_release(&self()->block->proxy_token);
}

}  // namespace emu
