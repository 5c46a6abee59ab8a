#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace persimmon_fast::cpu {
namespace {

constexpr Isa kLevels[] = {Isa::kScalar, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16, Isa::kAmx};

#if defined(__x86_64__)
// Tile registers need the processor (leaf 7, EDX: bit 24 AMX-TILE, bit 22 AMX-BF16) and, on Linux, the kernel's
// permission for this process: https://docs.kernel.org/arch/x86/xstate.html
bool amx_bf16_usable() {
#if defined(__linux__)
  unsigned eax, ebx, ecx, edx;
  constexpr unsigned kAmxBits = 1u << 24 | 1u << 22;
  constexpr int kArchReqXcompPerm = 0x1023;
  constexpr int kTileData = 18;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (edx & kAmxBits) == kAmxBits &&
         syscall(SYS_arch_prctl, kArchReqXcompPerm, kTileData) == 0;
#else
  return false;
#endif
}
#endif

Isa detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (avx512_bf16 && amx_bf16_usable()) return Isa::kAmx;
  if (avx512_bf16) return Isa::kAvx512Bf16;
  if (avx512) return Isa::kAvx512;
  if (avx2) return Isa::kAvx2;
#endif
  return Isa::kScalar;
}

Isa initial() {
  const char* forced = std::getenv("PERSIMMON_FAST_CPU_ISA");
  if (forced == nullptr || *forced == '\0') return best_isa();
  const Isa isa = parse_isa(forced);
  if (isa > best_isa()) {
    throw std::invalid_argument(std::string("PERSIMMON_FAST_CPU_ISA=") + forced + ": this processor's best level is " +
                                isa_name(best_isa()));
  }
  return isa;
}

std::atomic<Isa>& active() {
  static std::atomic<Isa> isa{initial()};
  return isa;
}

}  // namespace

Isa best_isa() {
  static const Isa isa = detect();
  return isa;
}

Isa active_isa() { return active().load(std::memory_order_relaxed); }

void set_isa(Isa isa) {
  if (isa > best_isa()) {
    throw std::invalid_argument(std::string("set_cpu_isa: ") + isa_name(isa) +
                                " is not available, this processor's best level is " + isa_name(best_isa()));
  }
  active().store(isa, std::memory_order_relaxed);
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kScalar:
      return "scalar";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx512Bf16:
      return "avx512_bf16";
    case Isa::kAmx:
      return "amx";
  }
  return "unknown";
}

Isa parse_isa(const char* name) {
  for (const Isa isa : kLevels) {
    if (std::strcmp(name, isa_name(isa)) == 0) return isa;
  }
  throw std::invalid_argument(std::string("unknown CPU instruction set '") + name +
                              "': expected scalar, avx2, avx512, avx512_bf16 or amx");
}

}  // namespace persimmon_fast::cpu
