// What the emulator was built for (sanitizers) and how it runs: schedule, asynchronous copies, seed, resident blocks,
// architecture.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__SANITIZE_ADDRESS__)
#define EMU_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define EMU_ASAN 1
#endif
#endif
#ifndef EMU_ASAN
#define EMU_ASAN 0
#endif

#if defined(__SANITIZE_THREAD__)
#define EMU_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define EMU_TSAN 1
#endif
#endif
#ifndef EMU_TSAN
#define EMU_TSAN 0
#endif

#if EMU_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if EMU_TSAN
#include <sanitizer/common_interface_defs.h>
#include <sanitizer/tsan_interface.h>
extern "C" void __tsan_read_range(void*, unsigned long);
extern "C" void __tsan_write_range(void*, unsigned long);
#endif

// A function of the emulator itself. ThreadSanitizer must not see its memory accesses: all CUDA threads share the
// emulator's data on one OS thread, in an order that the kernel knows nothing of.
#define EMU_RT __attribute__((no_sanitize("thread"))) inline
// One copy per shared library, also where two libraries with an emulator are loaded.
#define EMU_STATE __attribute__((visibility("hidden"))) inline
// Where the kernel called: default arguments are evaluated at the outermost call that leaves them out.
#define EMU_SITE const char *site_file = __builtin_FILE(), int site_line = __builtin_LINE()
#define EMU_HERE (::emu::Site{site_file, site_line})

namespace emu {

struct Site {
  const char* file = nullptr;
  int line = 0;
};

// Which runnable CUDA thread continues at a synchronisation point.
enum class Schedule {
  kFifo,     // the one that waited longest: nearly lockstep, the order that hides most bugs
  kReverse,  // the one that became runnable last: one thread runs as far ahead as barriers allow
  kRandom,   // any
  kWarp,     // one of the warp that ran last: a warp runs far ahead of the others
  kPct,      // the one of highest random priority, with rare changes (probabilistic concurrency testing)
};

// When an asynchronous copy writes its destination.
enum class AsyncPolicy {
  kLate,    // in the wait that demands it: the latest moment that is allowed
  kEarly,   // at once
  kRandom,  // at any synchronisation point in between
};

struct Config {
  Schedule schedule = Schedule::kFifo;
  AsyncPolicy async = AsyncPolicy::kLate;
  uint64_t seed = 1;
  // Blocks that run interleaved; 0: all, up to kMaxResidentThreads. A block that takes over the threads of a finished
  // one is ordered behind it, so a race between these two stays unseen: hence all of them where races are looked for.
  int resident = EMU_TSAN ? 0 : 1;
  int architecture = 80;  // of the emulated GPU; 90: the kernels for sm_90a run
  size_t shared_bytes_wanted = 0;

  // What a block may use, static and dynamic together: 80 stands for sm_86 and sm_89, the least from sm_80 on.
  size_t max_shared_bytes() const {
    if (shared_bytes_wanted != 0) return shared_bytes_wanted;
    return (architecture >= 90 ? 227 : 99) * size_t{1024};
  }
};

inline Schedule parse_schedule(const std::string& name) {
  if (name == "fifo") return Schedule::kFifo;
  if (name == "reverse") return Schedule::kReverse;
  if (name == "random") return Schedule::kRandom;
  if (name == "warp") return Schedule::kWarp;
  if (name == "pct") return Schedule::kPct;
  throw std::invalid_argument("emulator: sched must be fifo, reverse, random, warp or pct, got '" + name + "'");
}

inline AsyncPolicy parse_async(const std::string& name) {
  if (name == "late") return AsyncPolicy::kLate;
  if (name == "early") return AsyncPolicy::kEarly;
  if (name == "random") return AsyncPolicy::kRandom;
  throw std::invalid_argument("emulator: async must be late, early or random, got '" + name + "'");
}

inline int parse_resident(long long resident) {
  if (resident >= 0 && resident <= 4096) return static_cast<int>(resident);
  throw std::invalid_argument("emulator: resident must be 0 (all blocks) to 4096, got " + std::to_string(resident));
}

inline int parse_architecture(long long architecture) {
  if (architecture == 80 || architecture == 90) return static_cast<int>(architecture);
  throw std::invalid_argument("emulator: architecture must be 80 or 90, got " + std::to_string(architecture));
}

inline Config config_from_environment() {
  Config config;
  const auto number = [](const char* name, const char* text) {
    char* end = nullptr;
    const long long value = std::strtoll(text, &end, 10);
    if (end == text || *end != '\0') {
      throw std::invalid_argument(std::string("emulator: ") + name + " must be a number, got '" + text + "'");
    }
    return value;
  };
  if (const char* text = std::getenv("PF_EMU_SCHED")) config.schedule = parse_schedule(text);
  if (const char* text = std::getenv("PF_EMU_ASYNC")) config.async = parse_async(text);
  if (const char* text = std::getenv("PF_EMU_SEED")) config.seed = static_cast<uint64_t>(number("PF_EMU_SEED", text));
  if (const char* text = std::getenv("PF_EMU_RESIDENT")) {
    config.resident = parse_resident(number("PF_EMU_RESIDENT", text));
  }
  if (const char* text = std::getenv("PF_EMU_MAX_SHARED_BYTES")) {
    config.shared_bytes_wanted = static_cast<size_t>(number("PF_EMU_MAX_SHARED_BYTES", text));
  }
  return config;
}

}  // namespace emu
