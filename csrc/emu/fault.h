// Memory faults of a kernel (null pointers, guard pages, stack overflow, misaligned vector accesses) become exceptions.
#pragma once

#include <signal.h>
#include <ucontext.h>

#include "csrc/emu/error.h"

namespace emu {

struct FaultState {
  alignas(16) char signal_stack[64 * 1024];
  stack_t previous_stack;
  struct sigaction previous_segv, previous_bus;
  void* address = nullptr;
  bool is_general_protection = false;  // x86: the address is not told
};
EMU_STATE FaultState fault_state;

// Continues on the emptied stack of the thread that faulted.
__attribute__((no_sanitize("thread"), no_sanitize("address"), noinline)) inline void report_fault() {
  CudaThread* thread = machine.current;
  const Site site = thread->site;
#if EMU_ASAN
  __asan_unpoison_memory_region(thread->fiber.stack, thread->fiber.stack_bytes);
#endif
  char after[128] = "before its first synchronisation";
  if (site.file != nullptr) {
    std::snprintf(after, sizeof after, "after its synchronisation at %s:%d", base_name(site.file), site.line);
  }
  if (fault_state.is_general_protection) {
    fail(Site{}, "invalid memory access %s: a misaligned vector access, or an address out of range", after);
  }
  const char* address = static_cast<const char*>(fault_state.address);
  const bool overflow = address < thread->fiber.stack && address >= thread->fiber.stack - kGuardBytes;
  fail(Site{}, "invalid memory access %s: %s (address %p)", after,
       overflow ? "local variables exceed the emulator's stack" : "out of bounds or null pointer", fault_state.address);
}

__attribute__((no_sanitize("thread"), no_sanitize("address"))) inline void on_fault(int signal, siginfo_t* info,
                                                                                    void* context) {
  if (machine.current == nullptr || machine.current == &machine.main) {  // not ours: faults again, for who was there
    sigaction(signal, signal == SIGSEGV ? &fault_state.previous_segv : &fault_state.previous_bus, nullptr);
    return;
  }
  fault_state.address = info->si_addr;
  fault_state.is_general_protection = info->si_code == SI_KERNEL;
  const Fiber& fiber = machine.current->fiber;
  auto* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  registers[REG_RSP] = static_cast<greg_t>(reinterpret_cast<uintptr_t>(fiber.stack + fiber.stack_bytes) - 8);
  registers[REG_RIP] = static_cast<greg_t>(reinterpret_cast<uintptr_t>(&report_fault));
}

inline void catch_faults() {
  stack_t stack{};
  stack.ss_sp = fault_state.signal_stack;  // the fiber's own may be what overflowed
  stack.ss_size = sizeof fault_state.signal_stack;
  sigaltstack(&stack, &fault_state.previous_stack);
  struct sigaction action{};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGSEGV, &action, &fault_state.previous_segv);
  sigaction(SIGBUS, &action, &fault_state.previous_bus);
}

inline void restore_faults() {
  sigaction(SIGSEGV, &fault_state.previous_segv, nullptr);
  sigaction(SIGBUS, &fault_state.previous_bus, nullptr);
  sigaltstack(&fault_state.previous_stack, nullptr);
}

}  // namespace emu
