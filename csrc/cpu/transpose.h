// transpose: a square block of registers, rows[i] lane j -> rows[j] lane i. For kernel files, as vec.h.
#pragma once

#include <utility>

#include "csrc/cpu/vec.h"

namespace persimmon_fast::cpu::PF_ISA {

#if defined(__AVX512F__)

// 16 x 16 in four rounds of 16 shuffles: pairs of rows, pairs of pairs, then 128-bit quarters twice.
inline void transpose(Vec (&rows)[16]) {
  __m512 quads[16];
  for (int i = 0; i < 16; i += 4) {
    const __m512 lo01 = _mm512_unpacklo_ps(rows[i].v, rows[i + 1].v);
    const __m512 hi01 = _mm512_unpackhi_ps(rows[i].v, rows[i + 1].v);
    const __m512 lo23 = _mm512_unpacklo_ps(rows[i + 2].v, rows[i + 3].v);
    const __m512 hi23 = _mm512_unpackhi_ps(rows[i + 2].v, rows[i + 3].v);
    const auto join_lo = [](__m512 a, __m512 b) {
      return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
    };
    const auto join_hi = [](__m512 a, __m512 b) {
      return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
    };
    // quads[i + c]: quarter q holds column 4 q + c of rows i .. i + 3
    quads[i] = join_lo(lo01, lo23);
    quads[i + 1] = join_hi(lo01, lo23);
    quads[i + 2] = join_lo(hi01, hi23);
    quads[i + 3] = join_hi(hi01, hi23);
  }
  for (int c = 0; c < 4; ++c) {
    const __m512 even_top = _mm512_shuffle_f32x4(quads[c], quads[c + 4], 0x88);  // columns c, c + 8
    const __m512 odd_top = _mm512_shuffle_f32x4(quads[c], quads[c + 4], 0xdd);   // columns c + 4, c + 12
    const __m512 even_bottom = _mm512_shuffle_f32x4(quads[c + 8], quads[c + 12], 0x88);
    const __m512 odd_bottom = _mm512_shuffle_f32x4(quads[c + 8], quads[c + 12], 0xdd);
    rows[c].v = _mm512_shuffle_f32x4(even_top, even_bottom, 0x88);
    rows[c + 8].v = _mm512_shuffle_f32x4(even_top, even_bottom, 0xdd);
    rows[c + 4].v = _mm512_shuffle_f32x4(odd_top, odd_bottom, 0x88);
    rows[c + 12].v = _mm512_shuffle_f32x4(odd_top, odd_bottom, 0xdd);
  }
}

#elif defined(__AVX2__)

inline void transpose(Vec (&rows)[8]) {
  __m256 quads[8];
  for (int i = 0; i < 8; i += 4) {
    const __m256 lo01 = _mm256_unpacklo_ps(rows[i].v, rows[i + 1].v);
    const __m256 hi01 = _mm256_unpackhi_ps(rows[i].v, rows[i + 1].v);
    const __m256 lo23 = _mm256_unpacklo_ps(rows[i + 2].v, rows[i + 3].v);
    const __m256 hi23 = _mm256_unpackhi_ps(rows[i + 2].v, rows[i + 3].v);
    // quads[i + c]: half h holds column 4 h + c of rows i .. i + 3
    quads[i] = _mm256_shuffle_ps(lo01, lo23, 0x44);
    quads[i + 1] = _mm256_shuffle_ps(lo01, lo23, 0xee);
    quads[i + 2] = _mm256_shuffle_ps(hi01, hi23, 0x44);
    quads[i + 3] = _mm256_shuffle_ps(hi01, hi23, 0xee);
  }
  for (int c = 0; c < 4; ++c) {
    rows[c].v = _mm256_permute2f128_ps(quads[c], quads[c + 4], 0x20);
    rows[c + 4].v = _mm256_permute2f128_ps(quads[c], quads[c + 4], 0x31);
  }
}

#else

inline void transpose(Vec (&rows)[Vec::kWidth]) {
  for (int i = 0; i < Vec::kWidth; ++i) {
    for (int j = 0; j < i; ++j) std::swap(rows[i].v[j], rows[j].v[i]);
  }
}

#endif

// Lane i of the result is the sum of the lanes of rows[i].
inline Vec reduce_add_each(Vec (&rows)[Vec::kWidth]) {
  transpose(rows);
  for (int step = Vec::kWidth / 2; step > 0; step /= 2) {
    for (int i = 0; i < step; ++i) rows[i] = rows[i] + rows[i + step];
  }
  return rows[0];
}

}  // namespace persimmon_fast::cpu::PF_ISA
