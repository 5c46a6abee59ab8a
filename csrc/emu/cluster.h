// Clusters: blocks that run at the same time, their barrier, and what they do to each other's shared memory.
#pragma once

#include "csrc/emu/barriers.h"
#include "csrc/emu/mbarrier.h"

namespace emu {

EMU_RT int cluster_rank() { return self()->block->rank_in_cluster; }

// Block `rank` of the cluster, which must not have ended: its shared memory ends with it.
EMU_RT Block* block_of_cluster(int rank, const char* operation, Site site) {
  const Cluster* cluster = self()->block->cluster;
  EMU_CHECK(rank >= 0 && rank < cluster->size, site, "%s: block %d of a cluster of %d", operation, rank, cluster->size);
  Block* block = cluster->blocks[rank];
  EMU_CHECK(block->live > 0, site, "%s: block %d of the cluster has ended, and its shared memory with it", operation,
            rank);
  return block;
}

// mbarrier.arrive at the same address in block `rank`
EMU_RT void mbarrier_arrive_cluster(uint32_t address, int rank, Site site) {
  const char* operation = "mbarrier.arrive.shared::cluster";
  Block* block = block_of_cluster(rank, operation, site);
  Mbarrier& barrier = find_mbarrier(block, address, operation, site);
  EMU_CHECK(barrier.is_visible || block == self()->block, site,
            "%s: the init at %s:%d was not followed by fence.mbarrier_init", operation, base_name(barrier.site.file),
            barrier.site.line);
  update_mbarrier(block, barrier, 1, 0, operation, site);
}

// ---- distributed shared memory: addresses of the whole cluster's, in a form of our own ----

constexpr uint32_t kClusterAddress = 0x80000000;

// mapa: the address of the same place in block `rank`.
EMU_RT uint32_t map_shared_rank(uint32_t address, int rank, Site site) {
  EMU_CHECK(rank >= 0 && rank < self()->block->cluster->size, site, "mapa: block %d of a cluster of %d", rank,
            self()->block->cluster->size);
  EMU_CHECK(address < kArenaBytes, site, "mapa: 0x%x is no address of the block's shared memory", address);
  return kClusterAddress | static_cast<uint32_t>(rank) << 24 | address;
}

EMU_RT char* cluster_word(uint32_t address, const char* operation, Site site) {
  EMU_CHECK((address & kClusterAddress) != 0, site, "%s: address 0x%x is not one that mapa has given", operation,
            address);
  Block* block = block_of_cluster(static_cast<int>(address >> 24 & 0x7f), operation, site);
  char* data = shared_range(block, address & 0xffffff, 4, 4, operation, site);
  if (copies_in_flight(block, data) != 0) fail_in_flight(block, operation, data, site);
  return data;
}

// ld.shared::cluster and st.shared::cluster of 4 bytes
template <class T>
EMU_RT T ld_shared_cluster(uint32_t address, Site site) {
  const char* data = cluster_word(address, "ld.shared::cluster", site);
  hb_read(data, 4);
  check_access(site);
  uint32_t word;
  __builtin_memcpy(&word, data, 4);
  return __builtin_bit_cast(T, word);
}
template <class T>
EMU_RT void st_shared_cluster(uint32_t address, T value, Site site) {
  char* data = cluster_word(address, "st.shared::cluster", site);
  hb_write(data, 4);
  check_access(site);
  __builtin_memcpy(data, &value, 4);
}

// ---- the barrier of the cluster ----

EMU_RT void complete_cluster_barrier(Cluster* cluster) {
  if (cluster->barrier.arrived >= cluster->live_threads) complete_barrier(cluster->barrier);
}

// barrier.cluster.arrive and .wait: each thread arrives, then waits, once. Threads that have returned count as arrived.
EMU_RT void cluster_arrive(Site site) {
  CudaThread* thread = self();
  Cluster* cluster = thread->block->cluster;
  EMU_CHECK(!thread->has_arrived, site, "barrier.cluster.arrive: the thread has arrived at %s:%d and not waited",
            base_name(thread->site.file), thread->site.line);
  thread->has_arrived = true;
  thread->site = site;
  thread->cluster_generation = cluster->barrier.generation;
  hb_release(&cluster->barrier.token[cluster->barrier.generation % 2]);
  ++cluster->barrier.arrived;
  complete_cluster_barrier(cluster);
}
EMU_RT void cluster_wait(Site site) {
  CudaThread* thread = self();
  Barrier& barrier = thread->block->cluster->barrier;
  EMU_CHECK(thread->has_arrived, site, "barrier.cluster.wait: the thread has not arrived");
  if (barrier.generation == thread->cluster_generation) block_in(barrier.waiting, "barrier.cluster.wait", site);
  thread->has_arrived = false;
  hb_acquire(&barrier.token[thread->cluster_generation % 2]);
}

EMU_RT void leave_cluster(const CudaThread* thread) {
  Cluster* cluster = thread->block->cluster;
  Barrier& barrier = cluster->barrier;
  hb_release(&barrier.token[barrier.generation % 2]);
  --cluster->live_threads;
  if (thread->has_arrived && thread->cluster_generation == barrier.generation) --barrier.arrived;
  if (cluster->live_threads > 0 && barrier.arrived > 0) complete_cluster_barrier(cluster);
}

}  // namespace emu
