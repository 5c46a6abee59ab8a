// What goes wrong in a kernel becomes a C++ exception on the stack of whoever launched it.
#pragma once

#include <cstdarg>
#include <cstdio>

#include "csrc/emu/machine.h"

namespace emu {

// A fault of an emulated kernel. PyTorch turns it into a RuntimeError.
class KernelError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

EMU_RT const char* base_name(const char* path) {
  const char* slash = std::strrchr(path, '/');
  return slash != nullptr ? slash + 1 : path;
}

// Appends to machine.error.
__attribute__((cold, format(printf, 2, 0), no_sanitize("thread"))) inline size_t append_error(size_t length,
                                                                                              const char* format,
                                                                                              va_list arguments) {
  if (length + 1 >= sizeof machine.error) return length;
  const int written = std::vsnprintf(machine.error + length, sizeof machine.error - length, format, arguments);
  return length + (written > 0 ? static_cast<size_t>(written) : 0);
}
__attribute__((cold, format(printf, 2, 3), no_sanitize("thread"))) inline size_t append_error(size_t length,
                                                                                              const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  length = append_error(length, format, arguments);
  va_end(arguments);
  return length;
}

// Ends the launch. In a kernel: leaves the thread where it is (its stack is reset before it is used again) and lets the
// caller of launch throw. Kernels own nothing that would need a destructor.
[[noreturn]] __attribute__((noinline, cold, format(printf, 2, 3), no_sanitize("thread"))) inline void fail(
    Site site, const char* format, ...) {
  CudaThread* thread = machine.current;
  size_t length = append_error(0, "emulated kernel %s: ", machine.grid.name);
  va_list arguments;
  va_start(arguments, format);
  length = append_error(length, format, arguments);
  va_end(arguments);
  if (site.file != nullptr) length = append_error(length, "; at %s:%d", base_name(site.file), site.line);
  machine.failed = true;
  if (thread == nullptr || thread == &machine.main) {
#if EMU_TSAN
    if (thread != nullptr) __tsan_switch_to_fiber(machine.main.fiber.tsan_fiber, __tsan_switch_to_fiber_no_sync);
#endif
    throw KernelError(machine.error);
  }
  const uint3 block = thread->block->index, index = thread->index;
  append_error(length, "; block (%u,%u,%u) thread (%u,%u,%u), warp %d lane %d", block.x, block.y, block.z, index.x,
               index.y, index.z, thread->rank / kWarpSize, thread->lane);
  hb_release(&machine.done_token);  // the text
  machine.current = &machine.main;
  switch_fiber(thread->fiber, machine.main.fiber);
  __builtin_unreachable();
}

#define EMU_CHECK(condition, site, ...)                                    \
  do {                                                                     \
    if (__builtin_expect(!(condition), 0)) ::emu::fail(site, __VA_ARGS__); \
  } while (0)

}  // namespace emu
