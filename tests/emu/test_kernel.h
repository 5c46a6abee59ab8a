// The frame of a kernel that tests the emulator: CASE(name, grid, block, dynamic shared bytes) { body } defines a
// kernel that Python runs by its name (kernel_library.py), with four pointers and four numbers.
#pragma once

#include <map>
#include <string>

#include "csrc/emu/cuda_on_cpu.h"

struct Args {
  void* pointers[4];
  int64_t numbers[4];

  template <class T>
  EMU_RT T* array(int i) const {
    return static_cast<T*>(pointers[i]);
  }
  // Whether the kernel is to make the mistake that its name tells.
  EMU_RT bool broken() const { return numbers[3] != 0; }
};

using Launcher = void (*)(const Args&);
inline std::map<std::string, Launcher>& cases() {
  static std::map<std::string, Launcher> all;
  return all;
}
struct Registration {
  Registration(const char* name, Launcher launcher) { cases()[name] = launcher; }
};

#define CASE(name, grid, block, dynamic_bytes)                                                 \
  static void name(Args args);                                                                 \
  static const Registration name##_registration(#name, []([[maybe_unused]] const Args& args) { \
    emu::launch_named(#name, name, grid, block, dynamic_bytes, args);                          \
  });                                                                                          \
  static void name([[maybe_unused]] Args args)

// Keeps the compiler from assuming anything about a value that a test gets wrong on purpose.
template <class T>
EMU_RT T opaque(T value) {
  asm volatile("" : "+r"(value) : : "memory");
  return value;
}
