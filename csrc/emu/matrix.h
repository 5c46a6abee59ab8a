// Matrix instructions of a warp: ldmatrix, stmatrix, mma.m16n8k16. Layouts: PTX ISA, "Warp Level Matrix Instructions".
#pragma once

#include "csrc/emu/shared_memory.h"
#include "csrc/emu/warp.h"

namespace emu {

// Shared-memory wavefronts of N 8x8 matrices whose row addresses are word `kWord` of each lane: 128 bytes per matrix
// are one wavefront if its 8 rows lie in 8 different groups of four banks.
template <int N, int kWord>
EMU_RT uint64_t count_wavefronts(const Warp& warp) {
  uint64_t wavefronts = 0;
  for (int matrix = 0; matrix < N; ++matrix) {
    int rows_in_group[8] = {}, most = 0;
    for (int row = 0; row < 8; ++row) {
      const int rows = ++rows_in_group[warp.in[8 * matrix + row][kWord] / 16 % 8];
      if (rows > most) most = rows;
    }
    wavefronts += static_cast<uint64_t>(most);
  }
  return wavefronts;
}

// Word `index` (two 16-bit elements) of lane `lane` in an 8x8 matrix given by rows: elements 2t, 2t+1 of row g, where
// g = lane / 4 and t = lane % 4; transposed: elements g of rows 2t and 2t+1. row(r) returns the four words of row r.
template <bool Trans, class Row>
EMU_RT uint32_t fragment_word(int lane, Row row) {
  const int g = lane / 4, t = lane % 4;
  if constexpr (!Trans) return row(g)[t];
  const uint32_t low = row(2 * t)[g / 2] >> g % 2 * 16, high = row(2 * t + 1)[g / 2] >> g % 2 * 16;
  return (low & 0xffff) | high << 16;
}

template <int N, bool Trans>
struct LdmatrixAll {
  struct Row {
    const Warp& warp;
    int matrix;
    EMU_RT const uint32_t* operator()(int r) const { return warp.in[8 * matrix + r]; }
  };
  EMU_RT void operator()(Warp& warp, uint32_t) const {
    machine.stats.ldmatrix_wavefronts += count_wavefronts<N, 4>(warp);
    machine.stats.ldmatrix_wavefronts_ideal += N;
    for (int lane = 0; lane < kWarpSize; ++lane) {
      for (int i = 0; i < N; ++i) warp.out[lane][i] = fragment_word<Trans>(lane, Row{warp, i});
    }
  }
};

// ldmatrix.m8n8.xN(.trans).b16: lane l gives the address of row l % 8 of matrix l / 8.
template <int N, bool Trans>
EMU_RT void ldmatrix(uint32_t (&r)[N], uint32_t address, Site site) {
  static_assert(N == 1 || N == 2 || N == 4);
  uint32_t row[5] = {0, 0, 0, 0, address};
  if (self()->lane < 8 * N) {
    const char* data = shared_pointer(address, 16, "ldmatrix", site);
    hb_read(data, 16);
    __builtin_memcpy(row, data, 16);
  }
  const uint32_t* out = collect(~0u, kLdmatrix, row, 5, site, LdmatrixAll<N, Trans>{});
  for (int i = 0; i < N; ++i) r[i] = out[i];
}

template <int N, bool Trans>
struct StmatrixAll {
  EMU_RT void operator()(Warp& warp, uint32_t) const {
    machine.stats.stmatrix_wavefronts += count_wavefronts<N, 4>(warp);
    machine.stats.stmatrix_wavefronts_ideal += N;
    for (int lane = 0; lane < kWarpSize; ++lane) {
      for (int i = 0; i < N; ++i) {
        const uint32_t word = warp.in[lane][i];
        const int g = lane / 4, t = lane % 4;
        if constexpr (!Trans) {
          warp.out[8 * i + g][t] = word;
        } else {
          for (int half = 0; half < 2; ++half) {
            uint32_t& target = warp.out[8 * i + 2 * t + half][g / 2];
            const int shift = g % 2 * 16;
            target = (target & ~(0xffffu << shift)) | (word >> 16 * half & 0xffff) << shift;
          }
        }
      }
    }
  }
};

// stmatrix.m8n8.xN(.trans).b16: the inverse of ldmatrix.
template <int N, bool Trans>
EMU_RT void stmatrix(uint32_t address, const uint32_t (&r)[N], Site site) {
  static_assert(N == 1 || N == 2 || N == 4);
  char* data = nullptr;
  if (self()->lane < 8 * N) data = shared_pointer(address, 16, "stmatrix", site);
  uint32_t words[5] = {0, 0, 0, 0, address};
  for (int i = 0; i < N; ++i) words[i] = r[i];
  const uint32_t* row = collect(~0u, kStmatrix, words, 5, site, StmatrixAll<N, Trans>{});
  if (data == nullptr) return;
  hb_write(data, 16);
  __builtin_memcpy(data, row, 16);
}

template <bool BF16>
EMU_RT float float_of_16_bits(uint32_t word, int half) {
  const uint32_t bits = word >> 16 * half & 0xffff;
  if constexpr (BF16) return __builtin_bit_cast(float, bits << 16);
  const uint32_t sign = (bits & 0x8000) << 16, exponent = bits >> 10 & 31, mantissa = bits & 1023;
  if (exponent == 31) return __builtin_bit_cast(float, sign | 0x7f800000 | mantissa << 13);
  if (exponent != 0) return __builtin_bit_cast(float, sign | (exponent + 112) << 23 | mantissa << 13);
  const float subnormal = static_cast<float>(mantissa) * 0x1p-24f;
  return sign != 0 ? -subnormal : subnormal;
}

template <bool BF16>
struct MmaAll {
  EMU_RT void operator()(Warp& warp, uint32_t) const {
    float a[16][16], b[16][8], d[16][8];
    ++machine.stats.mmas;
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const uint32_t* word = warp.in[lane];
      const int g = lane / 4, t = lane % 4 * 2;
      for (int half = 0; half < 2; ++half) {
        a[g][t + half] = float_of_16_bits<BF16>(word[0], half);
        a[g + 8][t + half] = float_of_16_bits<BF16>(word[1], half);
        a[g][t + 8 + half] = float_of_16_bits<BF16>(word[2], half);
        a[g + 8][t + 8 + half] = float_of_16_bits<BF16>(word[3], half);
        b[t + half][g] = float_of_16_bits<BF16>(word[4], half);
        b[t + 8 + half][g] = float_of_16_bits<BF16>(word[5], half);
        d[g][t + half] = __builtin_bit_cast(float, word[6 + half]);
        d[g + 8][t + half] = __builtin_bit_cast(float, word[8 + half]);
      }
    }
    for (int i = 0; i < 16; ++i) {
      for (int k = 0; k < 16; ++k) {
        for (int j = 0; j < 8; ++j) d[i][j] += a[i][k] * b[k][j];
      }
    }
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const int g = lane / 4, t = lane % 4 * 2;
      __builtin_memcpy(warp.out[lane], &d[g][t], 8);
      __builtin_memcpy(warp.out[lane] + 2, &d[g + 8][t], 8);
    }
  }
};

// mma.m16n8k16.row.col.f32.{bf16,f16}.{bf16,f16}.f32: d = a b + c. Sums in fp32 in the order of k; a tensor core groups
// and truncates otherwise, so results differ in the last bits.
template <bool BF16>
EMU_RT void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4],
                         Site site) {
  uint32_t words[10] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  for (int i = 0; i < 4; ++i) words[6 + i] = __builtin_bit_cast(uint32_t, c[i]);
  const uint32_t* out = collect(~0u, kMma, words, 10, site, MmaAll<BF16>{});
  for (int i = 0; i < 4; ++i) d[i] = __builtin_bit_cast(float, out[i]);
}

}  // namespace emu
