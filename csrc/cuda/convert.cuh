// Element conversions, and 16-byte pieces of rows.
#pragma once

#include "csrc/cuda/device.cuh"

namespace persimmon_fast::cuda {

DEV float to_float(float x) { return x; }
DEV float to_float(__half x) { return __half2float(x); }
DEV float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
DEV void from_float(float x, float& out) { out = x; }
DEV void from_float(float x, __half& out) { out = __float2half_rn(x); }
DEV void from_float(float x, __nv_bfloat16& out) { out = __float2bfloat16_rn(x); }

// Two values in one register, low half first, as mma fragments hold them.
DEV uint32_t pack2(float low, float high, __half) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
DEV uint32_t pack2(float low, float high, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

DEV float2 unpack2(uint32_t pair, __half) { return __half22float2(*reinterpret_cast<const __half2*>(&pair)); }
DEV float2 unpack2(uint32_t pair, __nv_bfloat16) {
  return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&pair));
}

// 16 bytes of a row.
template <typename scalar_t>
struct alignas(16) Chunk {
  static constexpr int kSize = 16 / sizeof(scalar_t);
  scalar_t values[kSize];
};

// The first n (at most kSize) elements at p; the rest is not defined. kAligned: p is 16-byte aligned and n is kSize.
template <bool kAligned, typename scalar_t>
DEV Chunk<scalar_t> load_chunk(const scalar_t* p, int n) {
  Chunk<scalar_t> chunk;
  if constexpr (kAligned) {
    chunk = *reinterpret_cast<const Chunk<scalar_t>*>(p);
  } else {
#pragma unroll
    for (int i = 0; i < Chunk<scalar_t>::kSize; ++i) {
      if (i < n) chunk.values[i] = p[i];
    }
  }
  return chunk;
}

template <bool kAligned, typename scalar_t>
DEV void store_chunk(scalar_t* p, const Chunk<scalar_t>& chunk, int n) {
  if constexpr (kAligned) {
    *reinterpret_cast<Chunk<scalar_t>*>(p) = chunk;
  } else {
#pragma unroll
    for (int i = 0; i < Chunk<scalar_t>::kSize; ++i) {
      if (i < n) p[i] = chunk.values[i];
    }
  }
}

// kVec elements at p. kAligned: kVec is whole chunks and p 16-byte aligned.
template <bool kAligned, int kVec, typename scalar_t>
DEV void load_vector(const scalar_t* p, float (&out)[kVec]) {
  constexpr int kStep = kAligned ? Chunk<scalar_t>::kSize : 1;
  static_assert(kVec % kStep == 0);
#pragma unroll
  for (int begin = 0; begin < kVec; begin += kStep) {
    const Chunk<scalar_t> chunk = load_chunk<kAligned>(p + begin, kStep);
#pragma unroll
    for (int i = 0; i < kStep; ++i) out[begin + i] = to_float(chunk.values[i]);
  }
}

template <bool kAligned, int kVec, typename scalar_t>
DEV void store_vector(scalar_t* p, const float (&values)[kVec]) {
  constexpr int kStep = kAligned ? Chunk<scalar_t>::kSize : 1;
  static_assert(kVec % kStep == 0);
#pragma unroll
  for (int begin = 0; begin < kVec; begin += kStep) {
    Chunk<scalar_t> chunk;
#pragma unroll
    for (int i = 0; i < kStep; ++i) from_float(values[begin + i], chunk.values[i]);
    store_chunk<kAligned>(p + begin, chunk, kStep);
  }
}

inline bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace persimmon_fast::cuda
