// Instructions of sm_90a: mbarrier, TMA, clusters, register reallocation. As ptx.cuh: PTX under nvcc, its
// emulation (csrc/emu) on a CPU. Matrix products: wgmma.cuh.
#pragma once

#include "csrc/cuda/ptx.cuh"
#include "csrc/cuda/tensor_map.h"

// Whether this pass of the compiler is one for sm_90a. Kernels that use this file or wgmma.cuh have their bodies inside
// it, and are launched where DeviceLimits::runs_sm90a.
#if defined(PF_EMULATE) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define PF_SM90A 1
#endif

namespace persimmon_fast::cuda::ptx {

#ifdef PF_EMULATE

inline void mbarrier_init(uint32_t barrier, int count PF_SITE) { emu::mbarrier_init(barrier, count, EMU_HERE); }
inline void fence_mbarrier_init() { emu::fence_mbarrier_init(); }
inline void mbarrier_arrive(uint32_t barrier PF_SITE) { emu::mbarrier_arrive(barrier, EMU_HERE); }
inline void mbarrier_arrive_cluster(uint32_t barrier, int rank PF_SITE) {
  emu::mbarrier_arrive_cluster(barrier, rank, EMU_HERE);
}
inline void mbarrier_arrive_expect_tx(uint32_t barrier, int bytes PF_SITE) {
  emu::mbarrier_arrive_expect_tx(barrier, bytes, EMU_HERE);
}
inline void mbarrier_wait(uint32_t barrier, int parity PF_SITE) { emu::mbarrier_wait(barrier, parity, EMU_HERE); }
inline void stmatrix(uint32_t address, const uint32_t (&r)[4] PF_SITE) {
  emu::stmatrix<4, false>(address, r, EMU_HERE);
}
inline void fence_proxy_async() { emu::fence_proxy_async(); }
template <int N>
inline void tma_load(uint32_t dst, const CUtensorMap* map, uint32_t barrier, const int (&at)[N] PF_SITE) {
  emu::tma_load(dst, map, barrier, N, at, 0, EMU_HERE);
}
template <int N>
inline void tma_load_multicast(uint32_t dst, const CUtensorMap* map, uint32_t barrier, const int (&at)[N],
                               uint16_t cta_mask PF_SITE) {
  emu::tma_load(dst, map, barrier, N, at, cta_mask, EMU_HERE);
}
template <int N>
inline void tma_store(const CUtensorMap* map, uint32_t src, const int (&at)[N] PF_SITE) {
  emu::tma_store(map, src, N, at, EMU_HERE);
}
inline void tma_store_commit() { emu::tma_store_commit(); }
template <int N>
inline void tma_store_wait_read(PF_SITE0) {
  emu::tma_store_wait(N, true, EMU_HERE);
}
template <int N>
inline void tma_store_wait(PF_SITE0) {
  emu::tma_store_wait(N, false, EMU_HERE);
}
inline void prefetch_tensor_map(const CUtensorMap*) {}
inline int cluster_rank() { return emu::cluster_rank(); }
inline uint32_t map_shared_rank(uint32_t address, int rank PF_SITE) {
  return emu::map_shared_rank(address, rank, EMU_HERE);
}
template <typename T>
inline T ld_shared_cluster(uint32_t address PF_SITE) {
  static_assert(sizeof(T) == 4);
  return emu::ld_shared_cluster<T>(address, EMU_HERE);
}
template <typename T>
inline void st_shared_cluster(uint32_t address, T value PF_SITE) {
  static_assert(sizeof(T) == 4);
  emu::st_shared_cluster(address, value, EMU_HERE);
}
inline void cluster_arrive(PF_SITE0) { emu::cluster_arrive(EMU_HERE); }
inline void cluster_wait(PF_SITE0) { emu::cluster_wait(EMU_HERE); }
template <int N>
inline void increase_registers(PF_SITE0) {
  emu::setmaxnreg(N, true, EMU_HERE);
}
template <int N>
inline void decrease_registers(PF_SITE0) {
  emu::setmaxnreg(N, false, EMU_HERE);
}
inline void barrier_sync(int id, int num_threads PF_SITE) { emu::barrier_sync(id, num_threads, EMU_HERE); }
inline void barrier_arrive(int id, int num_threads PF_SITE) { emu::barrier_arrive(id, num_threads, EMU_HERE); }

#else

// mbarrier (9.7.13.15): `count` arrivals and the bytes that were announced complete a phase. The barrier of an even
// phase is passed with parity 0, that of an odd one with parity 1; a fresh one is passed with parity 1 at once.
DEV void mbarrier_init(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
// The inits of this thread become visible to TMA and to the cluster (at its next barrier).
DEV void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEV void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// On the barrier at the same address in block `rank` of the cluster. It orders this block's accesses alone: what it
// tells the other block is that shared memory has been read, not what stands in it (.release.cluster costs a fence).
DEV void mbarrier_arrive_cluster(uint32_t barrier, int rank) {
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}
// Arrives and announces bytes that TMA will bring.
DEV void mbarrier_arrive_expect_tx(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
DEV void mbarrier_wait(uint32_t barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// stmatrix (9.7.14): the inverse of ldmatrix, of four matrices.
DEV void stmatrix(uint32_t address, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r[0]), "r"(r[1]),
               "r"(r[2]), "r"(r[3])
               : "memory");
}

// fence.proxy.async: what this thread wrote to shared memory by ordinary stores, before what TMA and wgmma read.
DEV void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// cp.async.bulk.tensor (9.7.9.25.5): the box of `map` at coordinates `at` (dimension 0 first) to shared memory; its
// bytes arrive on `barrier`. By one thread. _multicast: to the same place, and barrier, of each block in cta_mask.
template <int N>
DEV void tma_load(uint32_t dst, const CUtensorMap* map, uint32_t barrier, const int (&at)[N]) {
  static_assert(N >= 2 && N <= 4);
  if constexpr (N == 2) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], "
        "[%2];" ::"r"(dst),
        "l"(map), "r"(barrier), "r"(at[0]), "r"(at[1])
        : "memory");
  } else if constexpr (N == 3) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
        "[%2];" ::"r"(dst),
        "l"(map), "r"(barrier), "r"(at[0]), "r"(at[1]), "r"(at[2])
        : "memory");
  } else {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
        "[%1, {%3, %4, %5, %6}], [%2];" ::"r"(dst),
        "l"(map), "r"(barrier), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3])
        : "memory");
  }
}
template <int N>
DEV void tma_load_multicast(uint32_t dst, const CUtensorMap* map, uint32_t barrier, const int (&at)[N],
                            uint16_t cta_mask) {
  static_assert(N == 2);
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%3, %4}], [%2], %5;" ::"r"(dst),
      "l"(map), "r"(barrier), "r"(at[0]), "r"(at[1]), "h"(cta_mask)
      : "memory");
}

// The box in shared memory to the tensor, in the thread's current group; commit closes it. wait_read: until of all but
// the N last groups shared memory has been read and may be overwritten; wait: until their writes are done, and visible
// to this thread.
template <int N>
DEV void tma_store(const CUtensorMap* map, uint32_t src, const int (&at)[N]) {
  static_assert(N == 2 || N == 3);
  if constexpr (N == 2) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
                 "r"(src), "r"(at[0]), "r"(at[1])
                 : "memory");
  } else {
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map),
                 "r"(src), "r"(at[0]), "r"(at[1]), "r"(at[2])
                 : "memory");
  }
}
DEV void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int N>
DEV void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}
template <int N>
DEV void tma_store_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory");
}
DEV void prefetch_tensor_map(const CUtensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }

// Clusters: the block's number in its cluster; a barrier of all threads of the cluster in two halves.
DEV int cluster_rank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// mapa (9.7.9.24): the address of the same place in the shared memory of block `rank`; ld and st of 4 bytes there. The
// block must have begun and must not end before: cluster_arrive() and cluster_wait() on both sides.
DEV uint32_t map_shared_rank(uint32_t address, int rank) {
  uint32_t mapped;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
}
template <typename T>
DEV T ld_shared_cluster(uint32_t address) {
  static_assert(sizeof(T) == 4);
  uint32_t word;
  asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(word) : "r"(address) : "memory");
  T value;
  memcpy(&value, &word, 4);
  return value;
}
template <typename T>
DEV void st_shared_cluster(uint32_t address, T value) {
  static_assert(sizeof(T) == 4);
  uint32_t word;
  memcpy(&word, &value, 4);
  asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(address), "r"(word) : "memory");
}
DEV void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
DEV void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// setmaxnreg: registers per thread of this warpgroup from here on. By all its warps; multiples of 8.
template <int N>
DEV void increase_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
DEV void decrease_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

// bar: barrier `id` (1 .. 15; 0 is __syncthreads()) of num_threads threads. _arrive does not wait.
DEV void barrier_sync(int id, int num_threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(num_threads) : "memory");
}
DEV void barrier_arrive(int id, int num_threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(num_threads) : "memory");
}

#endif

}  // namespace persimmon_fast::cuda::ptx
