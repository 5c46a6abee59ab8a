// Instruction sets of the CPU kernels.
//
// Every kernel file under csrc/cpu is compiled once per instruction set, inside a namespace named after it
// (PF_ISA). A header declares a kernel with PF_CPU_KERNEL, which adds the function that callers use: it forwards
// to the copy for active_isa(). The level is the best one that the processor has, chosen once at load time;
// PERSIMMON_FAST_CPU_ISA (scalar, avx2, avx512, avx512_bf16, amx) or set_isa() choose a lower one. Level amx runs the
// avx512_bf16 copies, which ask active_isa() where tiles pay.
#pragma once

#include <cstdint>

namespace persimmon_fast::cpu {

enum class Isa { kScalar, kAvx2, kAvx512, kAvx512Bf16, kAmx };

Isa best_isa();              // of this processor and this build
Isa active_isa();            // the level that kernels run at
void set_isa(Isa isa);       // throws std::invalid_argument if the processor lacks it
const char* isa_name(Isa);   // "scalar", "avx2", "avx512", "avx512_bf16", "amx"
Isa parse_isa(const char*);  // throws std::invalid_argument on an unknown name

}  // namespace persimmon_fast::cpu

// Declares `void name(const Params&, int64_t begin, int64_t end)`, a kernel that does the part [begin, end) of its
// work items on the calling thread. Use inside namespace persimmon_fast::cpu.
#if defined(__x86_64__)
#define PF_CPU_KERNEL(name, Params)                                    \
  namespace scalar {                                                   \
  void name(const Params&, int64_t begin, int64_t end);                \
  }                                                                    \
  namespace avx2 {                                                     \
  void name(const Params&, int64_t begin, int64_t end);                \
  }                                                                    \
  namespace avx512 {                                                   \
  void name(const Params&, int64_t begin, int64_t end);                \
  }                                                                    \
  namespace avx512_bf16 {                                              \
  void name(const Params&, int64_t begin, int64_t end);                \
  }                                                                    \
  inline void name(const Params& params, int64_t begin, int64_t end) { \
    switch (active_isa()) {                                            \
      case Isa::kScalar:                                               \
        return scalar::name(params, begin, end);                       \
      case Isa::kAvx2:                                                 \
        return avx2::name(params, begin, end);                         \
      case Isa::kAvx512:                                               \
        return avx512::name(params, begin, end);                       \
      case Isa::kAvx512Bf16:                                           \
      case Isa::kAmx:                                                  \
        return avx512_bf16::name(params, begin, end);                  \
    }                                                                  \
  }
#else
#define PF_CPU_KERNEL(name, Params)                     \
  namespace scalar {                                    \
  void name(const Params&, int64_t begin, int64_t end); \
  }                                                     \
  inline void name(const Params& params, int64_t begin, int64_t end) { scalar::name(params, begin, end); }
#endif
