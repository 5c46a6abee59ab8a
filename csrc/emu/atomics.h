// Atomic operations, fences, and loads and stores with acquire and release semantics.
//
// As in CUDA, atomicAdd and its kin are relaxed: they order nothing but themselves. A fence before one makes it a
// release, a fence after it an acquire. A fence at block scope does so for shared memory alone. Approximations: a fence
// stays in force for all later atomics of its thread, so one that comes too early is not noticed.
#pragma once

#include <type_traits>

#include "csrc/emu/shared_memory.h"

namespace emu {

// Not EMU_RT: ThreadSanitizer is to see these accesses, as atomic ones, which race with plain ones alone.
template <class T>
inline T load_relaxed(const T* address) {
  using Word = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  return __builtin_bit_cast(T, __atomic_load_n(reinterpret_cast<const Word*>(address), __ATOMIC_RELAXED));
}
template <class T>
inline void store_relaxed(T* address, T value) {
  using Word = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  __atomic_store_n(reinterpret_cast<Word*>(address), __builtin_bit_cast(Word, value), __ATOMIC_RELAXED);
}

template <class T>
EMU_RT void check_atomic(const T* address, const char* operation, Site site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "atomic operations are on 4 or 8 bytes");
  EMU_CHECK(address != nullptr, site, "%s: null pointer", operation);
  EMU_CHECK(reinterpret_cast<uintptr_t>(address) % sizeof(T) == 0, site, "%s: address %p is not %zu-byte aligned",
            operation, static_cast<const void*>(address), sizeof(T));
}

EMU_RT bool is_ordered_by(CudaThread::Fence fence, const void* address) {
  return fence == CudaThread::kDeviceFence || (fence == CudaThread::kBlockFence && is_shared(self()->block, address));
}

// Replaces the value by update(value), returns the old one.
template <class T, class Update>
EMU_RT T atomic_update(T* address, const char* operation, Site site, Update update) {
  CudaThread* thread = self();
  check_atomic(address, operation, site);
  const T old = load_relaxed(address);
  const T updated = update(old);
  store_relaxed(address, updated);
  if (is_ordered_by(thread->fence, address)) hb_release(address);
  thread->atomics[thread->num_atomics++ % 4] = address;
  if (std::memcmp(&old, &updated, sizeof(T)) != 0) note_progress();
  preempt(site);
  return old;
}

EMU_RT void fence(CudaThread::Fence scope) {
  CudaThread* thread = self();
  if (scope > thread->fence) thread->fence = scope;
  for (const void* address : thread->atomics) {
    if (address != nullptr && is_ordered_by(scope, address)) hb_acquire(address);
  }
}

// ld.acquire.gpu: what the thread that released the value had done before is visible from here on. The other threads
// run first, so a loop around it makes progress.
template <class T>
EMU_RT T ld_acquire(const T* address, Site site) {
  check_atomic(address, "ld.acquire", site);
  yield(site);
  const T value = load_relaxed(address);
  hb_acquire(address);
  return value;
}

// st.release.gpu
template <class T>
EMU_RT void st_release(T* address, std::type_identity_t<T> value, Site site) {
  check_atomic(address, "st.release", site);
  store_relaxed(address, value);
  hb_release(address);
  note_progress();
  preempt(site);
}

// atom.acq_rel.gpu.add: returns the old value
template <class T>
EMU_RT T atom_add_acq_rel(T* address, std::type_identity_t<T> value, Site site) {
  check_atomic(address, "atom.acq_rel.add", site);
  const T old = load_relaxed(address);
  hb_acquire(address);
  store_relaxed(address, static_cast<T>(old + value));
  hb_release(address);
  note_progress();
  preempt(site);
  return old;
}

}  // namespace emu
