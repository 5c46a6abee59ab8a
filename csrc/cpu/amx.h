// The AMX tile unit: its configuration and instructions, for kernel files that are compiled for bf16.
//
// Written as asm because the intrinsics of GCC 12 do not tell the compiler which memory they read: it may drop or delay
// the stores that fill a configuration or a buffer.
#pragma once

#include <cstdint>

namespace persimmon_fast::cpu::PF_ISA {
namespace amx {

// The operand of ldtilecfg, Intel SDM vol. 1, section 18.3.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int num_rows, int bytes) {
    rows[tile] = static_cast<uint8_t>(num_rows);
    row_bytes[tile] = static_cast<uint16_t>(bytes);
  }
};
static_assert(sizeof(TileConfig) == 64, "ldtilecfg reads 64 bytes");

inline void configure(const TileConfig& config) { asm volatile("ldtilecfg %0" ::"m"(config)); }
inline void release() { asm volatile("tilerelease"); }

template <int kTile>
inline void zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}

// Rows of a tile lie stride_bytes apart in memory.
template <int kTile>
inline void load(const void* p, int64_t stride_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride_bytes), "i"(kTile) : "memory");
}
template <int kTile>
inline void store(void* p, int64_t stride_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride_bytes), "i"(kTile) : "memory");
}

// C [m][n] fp32 += A [m][2 k] bf16  x  B [k][n][2] bf16. Products are exact; sums are fp32, rounded to nearest even, in
// the order of k; subnormal numbers count as zero. Rows of A and columns of B do not see one another.
template <int kC, int kA, int kB>
inline void multiply_add() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
}

}  // namespace amx
}  // namespace persimmon_fast::cpu::PF_ISA
