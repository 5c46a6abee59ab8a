// wgmma (PTX ISA 9.7.15): d += a b by the 128 threads of a warpgroup, asynchronously, 64 x N x 16 in fp16 or bf16 with
// fp32 sums. As ptx.cuh: one instruction per wrapper under nvcc, its emulation on a CPU.
//
// d[R]      R = N / 2. Of thread t, w = t / 32, g = t % 32 / 4, q = t % 4: d[4 j + 2 h + e] is row 16 w + 8 h + g,
//           column 8 j + 2 q + e
// a         wgmma_ss: in shared memory, K-major (rows of 64 elements of k). wgmma_rs: in registers, a[0..3] as the a of
//           ptx::mma for the warp's 16 rows
// b         in shared memory. kTransB 0: K-major, [N][64]; 1: N-major, [16 of k][64 of N] in boxes of 64 columns
// Order     wgmma_fence() before the first wgmma, and after registers that it reads or adds to were touched;
//           wgmma_commit() closes a group; until wgmma_wait<n>() leaves at most n groups in flight, nobody may touch
//           their registers or overwrite their shared memory
#pragma once

#include "csrc/cuda/ptx_sm90.cuh"

namespace persimmon_fast::cuda::ptx {

// Descriptor of an operand that TMA wrote with the swizzle of 128 bytes. group_stride: bytes from one group of 64
// columns to the next, for an N-major operand; of K-major ones it is not looked at. Eight rows are 1,024 bytes.
DEV uint64_t wgmma_operand(uint32_t address, uint32_t group_stride = 16) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  return (address & 0x3ffff) >> 4 | uint64_t{group_stride >> 4} << 16 | uint64_t{1024 >> 4} << 32 | kSwizzle128;
}

// The same operand some bytes further on: a sum of 32 bits, for the upper half is a constant.
DEV uint64_t wgmma_operand_at(uint64_t operand, int bytes) {
  return (operand >> 32 << 32) | (static_cast<uint32_t>(operand) + static_cast<uint32_t>(bytes >> 4));
}

#ifdef PF_EMULATE

template <int kTransB, int R, typename scalar_t>
inline void wgmma_ss(float (&d)[R], uint64_t a, uint64_t b, bool accumulate, scalar_t PF_SITE) {
  emu::wgmma(d, R, nullptr, a, b, kTransB != 0, accumulate, std::is_same_v<scalar_t, __nv_bfloat16>, EMU_HERE);
}
template <int kTransB, int R, typename scalar_t>
inline void wgmma_rs(float (&d)[R], const uint32_t (&a)[4], uint64_t b, bool accumulate, scalar_t PF_SITE) {
  emu::wgmma(d, R, a, 0, b, kTransB != 0, accumulate, std::is_same_v<scalar_t, __nv_bfloat16>, EMU_HERE);
}
inline void wgmma_fence(PF_SITE0) { emu::wgmma_fence(EMU_HERE); }
inline void wgmma_commit(PF_SITE0) { emu::wgmma_commit(EMU_HERE); }
template <int N>
inline void wgmma_wait(PF_SITE0) {
  emu::wgmma_wait(N, EMU_HERE);
}
template <int R>
inline void wgmma_registers(float (&)[R]) {}
template <int R>
inline void wgmma_registers(uint32_t (&)[R][4]) {}

#else

DEV void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEV void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
DEV void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// After a wait: no instruction, but the compiler moves no use of the sums before it, and gives the registers of a to
// nobody until then.
template <int R>
DEV void wgmma_registers(float (&d)[R]) {
#pragma unroll
  for (int i = 0; i < R; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
template <int R>
DEV void wgmma_registers(uint32_t (&a)[R][4]) {
#pragma unroll
  for (int i = 0; i < R; ++i) asm volatile("" : "+r"(a[i][0]), "+r"(a[i][1]), "+r"(a[i][2]), "+r"(a[i][3])::"memory");
}

// The registers of d in the assembly: 32 names, and 32 operands, at a time.
#define PF_NAMES_0                                                         \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define PF_NAMES_32                                                                    \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define PF_NAMES_64                                                                    \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define PF_NAMES_96                                                                                \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define PF_8(i)                                                                                               \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define PF_32(i) PF_8(i), PF_8(i + 8), PF_8(i + 16), PF_8(i + 24)

#define PF_UNPACK(...) __VA_ARGS__

// kR registers of d, operands of the assembly in (); n0 .. n6: the numbers of those behind them.
#define PF_WGMMA(kR, kN, type, scalar, names, registers, n0, n1, n2, n3, n4, n5, n6)                            \
  template <int kTransB>                                                                                        \
  DEV void wgmma_ss(float (&d)[kR], uint64_t a, uint64_t b, bool accumulate, scalar) {                          \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #n2 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #kN         \
                 "k16.f32." type "." type " {" names "}, %" #n0 ", %" #n1 ", p, 1, 1, 0, %" #n3 ";\n}"          \
                 : PF_UNPACK registers                                                                          \
                 : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(kTransB));                            \
  }                                                                                                             \
  template <int kTransB>                                                                                        \
  DEV void wgmma_rs(float (&d)[kR], const uint32_t (&a)[4], uint64_t b, bool accumulate, scalar) {              \
    asm volatile(                                                                                               \
        "{\n.reg .pred p;\nsetp.ne.b32 p, %" #n5 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #kN "k16.f32." type  \
        "." type " {" names "}, {%" #n0 ", %" #n1 ", %" #n2 ", %" #n3 "}, %" #n4 ", p, 1, 1, %" #n6 ";\n}"      \
        : PF_UNPACK registers                                                                                   \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)), "n"(kTransB)); \
  }
#define PF_WGMMA_16_BIT(kR, kN, names, registers, ...)                   \
  PF_WGMMA(kR, kN, "bf16", __nv_bfloat16, names, registers, __VA_ARGS__) \
  PF_WGMMA(kR, kN, "f16", __half, names, registers, __VA_ARGS__)

PF_WGMMA_16_BIT(32, 64, PF_NAMES_0, (PF_32(0)), 32, 33, 34, 35, 36, 37, 38)
PF_WGMMA_16_BIT(64, 128, PF_NAMES_0 PF_NAMES_32, (PF_32(0), PF_32(32)), 64, 65, 66, 67, 68, 69, 70)
PF_WGMMA_16_BIT(96, 192, PF_NAMES_0 PF_NAMES_32 PF_NAMES_64, (PF_32(0), PF_32(32), PF_32(64)), 96, 97, 98, 99, 100, 101,
                102)
PF_WGMMA_16_BIT(128, 256, PF_NAMES_0 PF_NAMES_32 PF_NAMES_64 PF_NAMES_96, (PF_32(0), PF_32(32), PF_32(64), PF_32(96)),
                128, 129, 130, 131, 132, 133, 134)

#undef PF_WGMMA_16_BIT
#undef PF_WGMMA
#undef PF_UNPACK
#undef PF_32
#undef PF_8
#undef PF_NAMES_96
#undef PF_NAMES_64
#undef PF_NAMES_32
#undef PF_NAMES_0

#endif

}  // namespace persimmon_fast::cuda::ptx
