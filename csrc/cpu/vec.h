// Vec: one register of fp32 lanes, in the instruction set that this translation unit is compiled for.
//
// Kernels are written once against this interface. Sixteen-bit values are widened on load and rounded once (to
// nearest even) on store; all arithmetic is fp32. `load(p)` reads kWidth elements, `load_n(p, n)` only the first n
// (the rest is zero), and the same for stores: tails need no padding of the caller's memory.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "csrc/common/types.h"

#ifndef PF_ISA
#error "vec.h is for kernel files that are compiled once per instruction set (PF_ISA)"
#endif

namespace persimmon_fast::cpu::PF_ISA {

#if defined(__AVX512F__)

struct Vec {
  static constexpr int kWidth = 16;
  __m512 v;

  static Vec set1(float x) { return {_mm512_set1_ps(x)}; }
  static Vec zero() { return {_mm512_setzero_ps()}; }
};

inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }  // b where a or b is NaN
inline float reduce_add(Vec a) { return _mm512_reduce_add_ps(a.v); }
inline float reduce_max(Vec a) { return _mm512_reduce_max_ps(a.v); }
inline Vec round(Vec a) { return {_mm512_roundscale_ps(a.v, 0)}; }
inline Vec scale_by_pow2(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }

inline Vec zero_where_minus_inf(Vec a, Vec x) {
  const __m512 minus_inf = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, minus_inf, _CMP_NEQ_UQ), a.v)};
}

inline __mmask16 first_lanes(int n) { return static_cast<__mmask16>((1u << n) - 1u); }

inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec load(const bf16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
inline Vec load(const fp16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
inline Vec load_n(const float* p, int n) { return {_mm512_maskz_loadu_ps(first_lanes(n), p)}; }
inline Vec load_n(const bf16* p, int n) {
  const __m256i bits = _mm256_maskz_loadu_epi16(first_lanes(n), p);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
inline Vec load_n(const fp16* p, int n) { return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p))}; }

inline __m256i to_bf16(Vec a) {
#if defined(__AVX512BF16__)
  // vcvtneps2bf16 flushes subnormal inputs to zero; at bf16 that loses values below 1.2e-38 only.
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a.v));
#else
  const __m512i word = _mm512_castps_si512(a.v);
  const __m512i lsb = _mm512_and_si512(_mm512_srli_epi32(word, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(word, _mm512_set1_epi32(0x7fff)), lsb);
  const __mmask16 is_nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_or_si512(word, _mm512_set1_epi32(0x00400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, is_nan, quiet), 16));
#endif
}
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline void store(bf16* p, Vec a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16(a)); }
inline void store(fp16* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline void store_n(float* p, Vec a, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), a.v); }
inline void store_n(bf16* p, Vec a, int n) { _mm256_mask_storeu_epi16(p, first_lanes(n), to_bf16(a)); }
inline void store_n(fp16* p, Vec a, int n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#elif defined(__AVX2__)

struct Vec {
  static constexpr int kWidth = 8;
  __m256 v;

  static Vec set1(float x) { return {_mm256_set1_ps(x)}; }
  static Vec zero() { return {_mm256_setzero_ps()}; }
};

inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }  // b where a or b is NaN
inline float reduce_add(Vec a) {
  const __m128 half = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  const __m128 pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
}
inline float reduce_max(Vec a) {
  const __m128 half = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  const __m128 pair = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(pair, _mm_movehdup_ps(pair)));
}
inline Vec round(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT)}; }
inline Vec scale_by_pow2(Vec a, Vec n) {  // n in [-126, 127]
  const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23);
  return {_mm256_mul_ps(a.v, _mm256_castsi256_ps(exponent))};
}
inline Vec zero_where_minus_inf(Vec a, Vec x) {
  const __m256 minus_inf = _mm256_set1_ps(-std::numeric_limits<float>::infinity());
  return {_mm256_and_ps(_mm256_cmp_ps(x.v, minus_inf, _CMP_NEQ_UQ), a.v)};
}

inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Vec load(const bf16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
}
inline Vec load(const fp16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
inline void store(bf16* p, Vec a) {
  const __m256i word = _mm256_castps_si256(a.v);
  const __m256i lsb = _mm256_and_si256(_mm256_srli_epi32(word, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(word, _mm256_set1_epi32(0x7fff)), lsb);
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i quiet = _mm256_or_si256(word, _mm256_set1_epi32(0x00400000));
  const __m256i bits = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(bits, bits), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
inline void store(fp16* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#else  // plain C++: the compiler's own vectoriser does what it can

struct Vec {
  static constexpr int kWidth = 8;
  float v[kWidth];

  static Vec set1(float x) {
    Vec r;
    for (float& lane : r.v) lane = x;
    return r;
  }
  static Vec zero() { return set1(0.0f); }
};

template <typename F>
inline Vec map_lanes(Vec a, Vec b, F f) {
  Vec r;
  for (int i = 0; i < Vec::kWidth; ++i) r.v[i] = f(a.v[i], b.v[i]);
  return r;
}
inline Vec operator+(Vec a, Vec b) {
  return map_lanes(a, b, [](float x, float y) { return x + y; });
}
inline Vec operator-(Vec a, Vec b) {
  return map_lanes(a, b, [](float x, float y) { return x - y; });
}
inline Vec operator*(Vec a, Vec b) {
  return map_lanes(a, b, [](float x, float y) { return x * y; });
}
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
inline Vec max(Vec a, Vec b) {  // b where a or b is NaN
  return map_lanes(a, b, [](float x, float y) { return x > y ? x : y; });
}
inline float reduce_add(Vec a) {
  float sum = 0.0f;
  for (const float lane : a.v) sum += lane;
  return sum;
}
inline float reduce_max(Vec a) {
  float best = a.v[0];
  for (const float lane : a.v) best = lane > best ? lane : best;
  return best;
}
inline Vec round(Vec a) {
  for (float& lane : a.v) lane = std::nearbyintf(lane);
  return a;
}
inline Vec scale_by_pow2(Vec a, Vec n) {
  return map_lanes(a, n, [](float x, float e) { return std::ldexp(x, static_cast<int>(e)); });
}
inline Vec zero_where_minus_inf(Vec a, Vec x) {
  return map_lanes(
      a, x, [](float value, float arg) { return arg == -std::numeric_limits<float>::infinity() ? 0.0f : value; });
}

template <typename T>
inline Vec load(const T* p) {
  Vec r;
  for (int i = 0; i < Vec::kWidth; ++i) r.v[i] = static_cast<float>(p[i]);
  return r;
}
template <typename T>
inline void store(T* p, Vec a) {
  for (int i = 0; i < Vec::kWidth; ++i) p[i] = static_cast<T>(a.v[i]);
}

#endif

#if !defined(__AVX512F__)
// Without lane masks a tail goes through a small buffer.
template <typename T>
inline Vec load_n(const T* p, int n) {
  T buffer[Vec::kWidth] = {};
  std::memcpy(buffer, p, n * sizeof(T));
  return load(buffer);
}
template <typename T>
inline void store_n(T* p, Vec a, int n) {
  T buffer[Vec::kWidth];
  store(buffer, a);
  std::memcpy(p, buffer, n * sizeof(T));
}
#endif

// The first n lanes, 0 < n <= kWidth: one plain access where the vector is whole.
template <typename T>
inline Vec load_part(const T* p, int64_t n) {
  return n >= Vec::kWidth ? load(p) : load_n(p, static_cast<int>(n));
}
template <typename T>
inline void store_part(T* p, Vec a, int64_t n) {
  n >= Vec::kWidth ? store(p, a) : store_n(p, a, static_cast<int>(n));
}

// e^x for softmax, to about 2 ulp: 2^n * e^f with n = round(x / ln 2), |f| <= ln(2)/2 in two-constant (Cody-Waite)
// reduction, and the degree-6 Taylor polynomial of e^f (truncation 1.6e-7 relative). x is clamped to [-87, 88], so
// the result neither overflows nor becomes subnormal, except -inf, which gives exactly 0. NaN stays NaN.
inline Vec exp(Vec x) {
  // max(a, b) is b where either is NaN: the data stands second.
  const Vec not_high = Vec::zero() - max(Vec::set1(-88.0f), Vec::zero() - x);
  const Vec clamped = max(Vec::set1(-87.0f), not_high);
  const Vec n = round(clamped * Vec::set1(1.44269504f));
  Vec f = fma(n, Vec::set1(-0.693359375f), clamped);
  f = fma(n, Vec::set1(2.12194440e-4f), f);
  Vec p = Vec::set1(1.0f / 720.0f);
  p = fma(p, f, Vec::set1(1.0f / 120.0f));
  p = fma(p, f, Vec::set1(1.0f / 24.0f));
  p = fma(p, f, Vec::set1(1.0f / 6.0f));
  p = fma(p, f, Vec::set1(0.5f));
  p = fma(p, f, Vec::set1(1.0f));
  p = fma(p, f, Vec::set1(1.0f));
  return zero_where_minus_inf(scale_by_pow2(p, n), x);
}

}  // namespace persimmon_fast::cpu::PF_ISA
