// CUDA C++ as kernels spell it: built-in variables, barriers, warp functions, atomics, device math.
#pragma once

#include <cmath>

#include "csrc/emu/atomics.h"
#include "csrc/emu/barriers.h"
#include "csrc/emu/warp.h"

#define threadIdx (::emu::thread_index())
#define blockIdx (::emu::block_index())
#define blockDim (::emu::block_dim())
#define gridDim (::emu::grid_dim())
#define warpSize 32
#define __launch_bounds__(...)

// ---- barriers and fences ----

inline void __syncthreads(EMU_SITE) { emu::sync_threads(EMU_HERE); }
inline void __syncwarp(unsigned mask = ~0u, EMU_SITE) { emu::sync_warp(mask, EMU_HERE); }
inline void __threadfence() { emu::fence(emu::CudaThread::kDeviceFence); }
inline void __threadfence_block() { emu::fence(emu::CudaThread::kBlockFence); }

// ---- warp functions ----

template <class T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32, EMU_SITE) {
  emu::check_width(width, EMU_HERE);
  const int lane = emu::lane_index();
  return emu::shuffle(mask, value, (lane & ~(width - 1)) | (source & (width - 1)), EMU_HERE);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, EMU_SITE) {
  emu::check_width(width, EMU_HERE);
  const int lane = emu::lane_index(), source = (lane ^ lane_mask) & 31;
  return emu::shuffle(mask, value, source / width > lane / width ? lane : source, EMU_HERE);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, EMU_SITE) {
  emu::check_width(width, EMU_HERE);
  const int lane = emu::lane_index(), distance = static_cast<int>(delta & 31);
  return emu::shuffle(mask, value, lane % width + distance < width ? lane + distance : lane, EMU_HERE);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, EMU_SITE) {
  emu::check_width(width, EMU_HERE);
  const int lane = emu::lane_index(), distance = static_cast<int>(delta & 31);
  return emu::shuffle(mask, value, lane % width >= distance ? lane - distance : lane, EMU_HERE);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, EMU_SITE) {
  return emu::ballot(mask, predicate != 0, EMU_HERE);
}
inline int __any_sync(unsigned mask, int predicate, EMU_SITE) {
  return emu::ballot(mask, predicate != 0, EMU_HERE) != 0;
}
inline int __all_sync(unsigned mask, int predicate, EMU_SITE) {
  return emu::ballot(mask, predicate != 0, EMU_HERE) == mask;
}

#define EMU_REDUCE(name, T, expression)                          \
  inline T name(unsigned mask, T value, EMU_SITE) {              \
    struct Op {                                                  \
      EMU_RT T operator()(T a, T b) const { return expression; } \
    };                                                           \
    return emu::reduce(mask, value, Op{}, EMU_HERE);             \
  }
EMU_REDUCE(__reduce_add_sync, unsigned, a + b)
EMU_REDUCE(__reduce_add_sync, int, static_cast<int>(static_cast<unsigned>(a) + static_cast<unsigned>(b)))
EMU_REDUCE(__reduce_min_sync, unsigned, a < b ? a : b)
EMU_REDUCE(__reduce_min_sync, int, a < b ? a : b)
EMU_REDUCE(__reduce_max_sync, unsigned, a > b ? a : b)
EMU_REDUCE(__reduce_max_sync, int, a > b ? a : b)
EMU_REDUCE(__reduce_and_sync, unsigned, a& b)
EMU_REDUCE(__reduce_or_sync, unsigned, a | b)
EMU_REDUCE(__reduce_xor_sync, unsigned, a ^ b)
#undef EMU_REDUCE

// ---- atomics: the types are those of CUDA ----

namespace emu {
template <class T, class... Types>
concept OneOf = (std::is_same_v<T, Types> || ...);
template <class T>
concept AtomicInteger = OneOf<T, int, unsigned, unsigned long long>;
template <class T>
concept AtomicNumber = AtomicInteger<T> || OneOf<T, float, double>;
template <class T>
concept AtomicExchangeable = AtomicInteger<T> || OneOf<T, float>;
}  // namespace emu

#define EMU_ATOMIC(name, Types, expression)                                   \
  template <emu::Types T>                                                     \
  inline T name(T* address, std::type_identity_t<T> value, EMU_SITE) {        \
    struct Update {                                                           \
      T value;                                                                \
      EMU_RT T operator()(T old) const { return static_cast<T>(expression); } \
    };                                                                        \
    return emu::atomic_update(address, #name, EMU_HERE, Update{value});       \
  }
EMU_ATOMIC(atomicAdd, AtomicNumber, old + value)
EMU_ATOMIC(atomicSub, AtomicInteger, old - value)
EMU_ATOMIC(atomicMin, AtomicInteger, old < value ? old : value)
EMU_ATOMIC(atomicMax, AtomicInteger, old > value ? old : value)
EMU_ATOMIC(atomicAnd, AtomicInteger, old& value)
EMU_ATOMIC(atomicOr, AtomicInteger, old | value)
EMU_ATOMIC(atomicXor, AtomicInteger, old ^ value)
EMU_ATOMIC(atomicExch, AtomicExchangeable, (static_cast<void>(old), value))
#undef EMU_ATOMIC

template <emu::AtomicInteger T>
inline T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value, EMU_SITE) {
  struct Update {
    T expected, value;
    EMU_RT T operator()(T old) const { return old == expected ? value : old; }
  };
  return emu::atomic_update(address, "atomicCAS", EMU_HERE, Update{expected, value});
}
inline unsigned atomicInc(unsigned* address, unsigned limit, EMU_SITE) {
  struct Update {
    unsigned limit;
    EMU_RT unsigned operator()(unsigned old) const { return old >= limit ? 0 : old + 1; }
  };
  return emu::atomic_update(address, "atomicInc", EMU_HERE, Update{limit});
}

// ---- memory, bits, math ----

template <class T>
inline T __ldg(const T* address) {
  return *address;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
// Byte i of the result is byte (selector >> 4 i & 7) of the eight of x, then y; selectors with sign replication (bit 3)
// are not emulated.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector, EMU_SITE) {
  EMU_CHECK((selector & 0xffff8888u) == 0, EMU_HERE, "__byte_perm: selector 0x%x replicates signs", selector);
  const uint64_t bytes = uint64_t{y} << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<unsigned>(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return result;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
inline float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }
inline unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
inline float __int_as_float(int x) { return __builtin_bit_cast(float, x); }
inline int __float_as_int(float x) { return __builtin_bit_cast(int, x); }

// More precise than the GPU's approximations.
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __frsqrt_rn(float x) { return 1.0f / sqrtf(x); }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }

template <class T>
inline T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
inline T max(T a, T b) {
  return a < b ? b : a;
}
