// Fibers: a stack of its own for each CUDA thread, all on one OS thread, and the switch between them.
#pragma once

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstring>

#include "csrc/emu/config.h"

#ifndef __x86_64__
#error "the emulator's context switch is written for x86-64"
#endif

namespace emu {

// Below each stack, without access. As much as a CUDA thread's local memory may be: no frame reaches across it.
constexpr size_t kGuardBytes = 512 * 1024;
// Instrumented frames are larger, and a sanitizer's report is made on the stack of the fiber that it is about.
constexpr size_t kStackBytes = EMU_ASAN || EMU_TSAN ? 512 * 1024 : 128 * 1024;

// Zeroed memory, or null. By a bare system call: ThreadSanitizer would take its own mmap for a write of the caller,
// with which a kernel that starts before its predecessor has ended (dependent_launch.h) would race.
EMU_RT char* map_memory(size_t bytes) {
  const long address =
      syscall(SYS_mmap, nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0L);
  return address == -1 ? nullptr : reinterpret_cast<char*>(address);
}

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  size_t stack_bytes = 0;
  void* asan_fake_stack = nullptr;
  void* tsan_fiber = nullptr;
};

// Pushes the registers that a function must preserve, exchanges the stacks, pops those of the other side.
__attribute__((naked, noinline, noipa)) inline void exchange_stacks(void** /*save*/, void* /*load*/) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}

// no_sync: a switch orders nothing; only CUDA's own synchronisation does.
__attribute__((no_sanitize("thread"), no_sanitize("address"), noinline)) inline void switch_fiber(Fiber& from,
                                                                                                  Fiber& to) {
#if EMU_ASAN
  __sanitizer_start_switch_fiber(&from.asan_fake_stack, to.stack, to.stack_bytes);
#endif
#if EMU_TSAN
  __tsan_switch_to_fiber(to.tsan_fiber, __tsan_switch_to_fiber_no_sync);
#endif
  exchange_stacks(&from.stack_pointer, to.stack_pointer);
#if EMU_ASAN
  __sanitizer_finish_switch_fiber(from.asan_fake_stack, nullptr, nullptr);
#endif
}

// To be called first in the entry function of a fiber.
EMU_RT void on_fiber_entry() {
#if EMU_ASAN
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
}

EMU_STATE void* tsan_creator = nullptr;

#if EMU_TSAN
// A new fiber is ordered behind its creator, which must know of no kernel: not the caller, who has seen them all.
EMU_RT void* create_tsan_fiber() {
  void* caller = __tsan_get_current_fiber();
  if (tsan_creator == nullptr) tsan_creator = __tsan_create_fiber(0);
  __tsan_switch_to_fiber(tsan_creator, __tsan_switch_to_fiber_no_sync);
  void* fiber = __tsan_create_fiber(0);
  __tsan_switch_to_fiber(caller, __tsan_switch_to_fiber_no_sync);
  return fiber;
}
#endif

// The next switch to the fiber calls entry() on its empty stack. Whatever it was doing before is forgotten.
EMU_RT void reset_fiber(Fiber& fiber, void (*entry)()) {
#if EMU_ASAN
  __asan_unpoison_memory_region(fiber.stack, fiber.stack_bytes);  // frames that were left without returning
#endif
#if EMU_TSAN
  // A fiber left in the middle keeps its shadow call stack: start with another.
  if (fiber.tsan_fiber != nullptr) __tsan_destroy_fiber(fiber.tsan_fiber);
  fiber.tsan_fiber = create_tsan_fiber();
#endif
  fiber.asan_fake_stack = nullptr;
  void** top = reinterpret_cast<void**>(fiber.stack + fiber.stack_bytes) - 2;  // where `ret` finds the entry; aligned
  *top = reinterpret_cast<void*>(entry);
  fiber.stack_pointer = top - 6;  // the six registers that exchange_stacks pops
}

inline void create_fiber(Fiber& fiber, void (*entry)()) {
  char* memory = map_memory(kGuardBytes + kStackBytes);
  if (memory == nullptr) throw std::runtime_error("emulator: no memory for the stack of another CUDA thread");
  mprotect(memory, kGuardBytes, PROT_NONE);  // a stack that overflows faults
  fiber.stack = memory + kGuardBytes;
  fiber.stack_bytes = kStackBytes;
  reset_fiber(fiber, entry);
}

// ---- happens-before, for ThreadSanitizer: what was done before release(token) is seen after acquire(token) ----

EMU_RT void hb_release([[maybe_unused]] const void* token) {
#if EMU_TSAN
  __tsan_release(const_cast<void*>(token));
#endif
}
EMU_RT void hb_acquire([[maybe_unused]] const void* token) {
#if EMU_TSAN
  __tsan_acquire(const_cast<void*>(token));
#endif
}

// The current fiber reads or writes this memory by means that the compiler does not instrument.
EMU_RT void hb_read([[maybe_unused]] const void* data, [[maybe_unused]] size_t bytes) {
#if EMU_TSAN
  if (bytes != 0) __tsan_read_range(const_cast<void*>(data), bytes);
#endif
}
EMU_RT void hb_write([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if EMU_TSAN
  if (bytes != 0) __tsan_write_range(data, bytes);
#endif
}

}  // namespace emu
