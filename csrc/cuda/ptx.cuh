// The only inline assembly of the project, with ptx_sm90.cuh and wgmma.cuh. Each wrapper is one PTX instruction under
// nvcc and its emulation (csrc/emu) on a CPU. Semantics: PTX ISA 8.x, section named at each wrapper.
#pragma once

#include "csrc/cuda/device.cuh"

namespace persimmon_fast::cuda::ptx {

#ifdef PF_EMULATE

#define PF_SITE , EMU_SITE
#define PF_SITE0 EMU_SITE
using emu::smem_u32;
template <int N>
inline void ldmatrix(uint32_t (&r)[N], uint32_t address PF_SITE) {
  emu::ldmatrix<N, false>(r, address, EMU_HERE);
}
template <int N>
inline void ldmatrix_trans(uint32_t (&r)[N], uint32_t address PF_SITE) {
  emu::ldmatrix<N, true>(r, address, EMU_HERE);
}
inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __nv_bfloat16 PF_SITE) {
  emu::mma_m16n8k16<true>(d, a, b, d, EMU_HERE);
}
inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half PF_SITE) {
  emu::mma_m16n8k16<false>(d, a, b, d, EMU_HERE);
}
inline void cp_async16(uint32_t dst, const void* src, int valid_bytes = 16 PF_SITE) {
  emu::cp_async(dst, src, 16, valid_bytes, EMU_HERE);
}
inline uint64_t evict_first_policy() { return 0; }
inline void cp_async16_once(uint32_t dst, const void* src, int valid_bytes, uint64_t PF_SITE) {
  emu::cp_async(dst, src, 16, valid_bytes, EMU_HERE);
}
inline void cp_async_commit() { emu::cp_async_commit(); }
template <int N>
inline void cp_async_wait() {
  emu::cp_async_wait(N);
}
inline float exp2_approx(float x) { return exp2f(x); }
inline void launch_dependents() { emu::griddepcontrol_launch_dependents(); }
inline void wait_for_predecessors() { emu::griddepcontrol_wait(); }

#else

// Address of shared memory in the form that the instructions below take.
DEV uint32_t smem_u32(const void* pointer) { return static_cast<uint32_t>(__cvta_generic_to_shared(pointer)); }

// ldmatrix (9.7.14): N 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8 and
// receives, of matrix i, elements 2 * (l % 4) and + 1 of row l / 4 in r[i]. _trans: of the transposed matrix.
template <int N>
DEV void ldmatrix(uint32_t (&r)[N], uint32_t address) {
  static_assert(N == 2 || N == 4);
  if constexpr (N == 4) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(address)
                 : "memory");
  }
}
template <int N>
DEV void ldmatrix_trans(uint32_t (&r)[N], uint32_t address) {
  static_assert(N == 2 || N == 4);
  if constexpr (N == 4) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(address)
                 : "memory");
  }
}

// mma.m16n8k16 (9.7.14): d += a b, fp32. Lane l, g = l / 4, t = l % 4: a[0] = A[g][2t, 2t+1], a[1] = A[g+8][..],
// a[2] = A[g][2t+8, 2t+9], a[3] = A[g+8][..]; b[0] = B[2t, 2t+1][g], b[1] = B[2t+8, 2t+9][g]; d[0..1] = D[g][2t, 2t+1],
// d[2..3] = D[g+8][..].
DEV void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __nv_bfloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
DEV void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// cp.async (9.7.9.25): 16 bytes from global to shared memory past the registers; bytes from valid_bytes on become zero,
// and the source is not read there. Both addresses 16-byte aligned.
DEV void cp_async16(uint32_t dst, const void* src, int valid_bytes = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(valid_bytes) : "memory");
}
// createpolicy (9.7.9.18): lines read under it leave L2 before others.
DEV uint64_t evict_first_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
// cp_async16 of what is read once, line after line: under a policy, and L2 fetches the whole line of 128 bytes.
DEV void cp_async16_once(uint32_t dst, const void* src, int valid_bytes, uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;" ::"r"(dst), "l"(src),
               "r"(valid_bytes), "l"(policy)
               : "memory");
}
DEV void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most the N groups that this thread committed last are in flight.
template <int N>
DEV void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// ex2.approx: 2^x to 2 ulp, subnormal results become 0.
DEV float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// griddepcontrol (9.7.13.13), for launch_dependent: the next kernel may start; wait until all before this one are done.
DEV void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
DEV void wait_for_predecessors() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#endif

}  // namespace persimmon_fast::cuda::ptx
