// What Python calls, through ctypes.
#include "tests/emu/test_kernel.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

static std::string message;

template <class Action>
static const char* message_of(Action action) {
  try {
    action();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

// The fault's message, or null.
EXPORT const char* run_case(const char* name, const Args* args) {
  return message_of([&] { cases().at(name)(*args); });
}

EXPORT const char* configure(const char* sched, const char* async, uint64_t seed, int resident, int architecture) {
  return message_of([&] {
    emu::configure(sched, async, seed, resident);
    emu::set_architecture(architecture);
  });
}

EXPORT emu::Stats stats() { return emu::stats(); }
