// __syncthreads and the named barriers behind it.
#pragma once

#include "csrc/emu/scheduler.h"

namespace emu {

EMU_RT void complete_barrier(Barrier& barrier) {
  barrier.arrived = 0;
  ++barrier.generation;
  note_progress();
  wake_all(barrier.waiting);
}

// __syncthreads() must be reached by all threads of the block in the same place. Threads that have returned count as
// arrived, as on every GPU since Volta.
EMU_RT void sync_threads(Site site) {
  CudaThread* thread = self();
  Block* block = thread->block;
  Barrier& barrier = block->barriers[0];
  if (const CudaThread* other = barrier.waiting.head) {
    EMU_CHECK(other->site.line == site.line, site,
              "divergent barrier: other threads of the block wait in the __syncthreads() at %s:%d",
              base_name(other->site.file), other->site.line);
  }
  const uint64_t* token = &barrier.token[barrier.generation % 2];
  hb_release(token);
  if (++barrier.arrived >= block->live) {
    complete_barrier(barrier);
  } else {
    block_in(barrier.waiting, "__syncthreads()", site);
  }
  hb_acquire(token);
}

// bar.sync id, num_threads
EMU_RT void barrier_sync(int id, int num_threads, Site site) {
  EMU_CHECK(id > 0 && id < kNumBarriers, site, "bar.sync: barrier %d; 1 to %d are for kernels", id, kNumBarriers - 1);
  EMU_CHECK(num_threads > 0 && num_threads % kWarpSize == 0, site, "bar.sync: %d threads are not whole warps",
            num_threads);
  Barrier& barrier = self()->block->barriers[id];
  const uint64_t* token = &barrier.token[barrier.generation % 2];
  hb_release(token);
  if (++barrier.arrived >= num_threads) {
    complete_barrier(barrier);
  } else {
    block_in(barrier.waiting, "bar.sync", site);
  }
  hb_acquire(token);
}

// bar.arrive id, num_threads: counts as arrived, does not wait
EMU_RT void barrier_arrive(int id, int num_threads, Site site) {
  EMU_CHECK(id > 0 && id < kNumBarriers, site, "bar.arrive: barrier %d; 1 to %d are for kernels", id, kNumBarriers - 1);
  Barrier& barrier = self()->block->barriers[id];
  hb_release(&barrier.token[barrier.generation % 2]);
  if (++barrier.arrived >= num_threads) complete_barrier(barrier);
}

}  // namespace emu
