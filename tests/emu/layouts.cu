// Fragment layouts: the matrix instructions on data whose place is known.
#include "tests/emu/test_kernel.h"

// a, b, c: fragments as they lie in registers, [lane][word]; d: likewise.
template <bool BF16>
static void multiply(const Args& args) {
  const unsigned lane = threadIdx.x;
  uint32_t a[4], b[2];
  float c[4], d[4];
  for (int i = 0; i < 4; ++i) a[i] = args.array<uint32_t>(0)[lane * 4 + i], c[i] = args.array<float>(2)[lane * 4 + i];
  for (int i = 0; i < 2; ++i) b[i] = args.array<uint32_t>(1)[lane * 2 + i];
  emu::mma_m16n8k16<BF16>(d, a, b, c, {__FILE__, __LINE__});
  for (int i = 0; i < 4; ++i) args.array<float>(3)[lane * 4 + i] = d[i];
}
CASE(mma_bf16, 1, 32, 0) { multiply<true>(args); }
CASE(mma_fp16, 1, 32, 0) { multiply<false>(args); }

// 0: the matrices, row after row; 1: what lane l receives, [l][word].
template <int N, bool Trans>
static void load(const Args& args) {
  SMEM_CARVER(smem);
  uint16_t* s_rows = smem.take<uint16_t>(N * 64);
  const unsigned lane = threadIdx.x;
  for (unsigned i = lane; i < N * 64; i += 32) s_rows[i] = args.array<uint16_t>(0)[i];
  __syncthreads();
  uint32_t r[N];
  emu::ldmatrix<N, Trans>(r, emu::smem_u32(s_rows + lane % (8 * N) * 8), {__FILE__, __LINE__});
  for (int i = 0; i < N; ++i) args.array<uint32_t>(1)[lane * N + i] = r[i];
}
CASE(ldmatrix_x1, 1, 32, 512) { load<1, false>(args); }
CASE(ldmatrix_x2, 1, 32, 512) { load<2, false>(args); }
CASE(ldmatrix_x4, 1, 32, 512) { load<4, false>(args); }
CASE(ldmatrix_x1_trans, 1, 32, 512) { load<1, true>(args); }
CASE(ldmatrix_x2_trans, 1, 32, 512) { load<2, true>(args); }
CASE(ldmatrix_x4_trans, 1, 32, 512) { load<4, true>(args); }

// 0: registers, [lane][word]; 1: the matrices, row after row.
template <int N, bool Trans>
static void store(const Args& args) {
  SMEM_CARVER(smem);
  uint16_t* s_rows = smem.take<uint16_t>(N * 64);
  const unsigned lane = threadIdx.x;
  uint32_t r[N];
  for (int i = 0; i < N; ++i) r[i] = args.array<uint32_t>(0)[lane * N + i];
  emu::stmatrix<N, Trans>(emu::smem_u32(s_rows + lane % (8 * N) * 8), r, {__FILE__, __LINE__});
  __syncthreads();
  for (unsigned i = lane; i < N * 64; i += 32) args.array<uint16_t>(1)[i] = s_rows[i];
}
CASE(stmatrix_x1, 1, 32, 512) { store<1, false>(args); }
CASE(stmatrix_x2, 1, 32, 512) { store<2, false>(args); }
CASE(stmatrix_x4, 1, 32, 512) { store<4, false>(args); }
CASE(stmatrix_x1_trans, 1, 32, 512) { store<1, true>(args); }
CASE(stmatrix_x2_trans, 1, 32, 512) { store<2, true>(args); }
CASE(stmatrix_x4_trans, 1, 32, 512) { store<4, true>(args); }

// Loads and stores a tile of 64 rows of 128 bytes; numbers[0]: with chunk c of row r in place c ^ r % 8, or unchanged.
CASE(swizzle, 1, 32, 64 * 128) {
  SMEM_CARVER(smem);
  uint4* s_tile = smem.take<uint4>(64 * 8, 128);
  const unsigned lane = threadIdx.x;
  const unsigned swizzled = args.numbers[0] != 0 ? 7 : 0;
  const auto place = [=](unsigned row, unsigned chunk) { return row * 8 + (chunk ^ (row & swizzled)); };
  for (unsigned i = lane; i < 64 * 8; i += 32) s_tile[place(i / 8, i % 8)] = uint4{i, i, i, i};
  __syncthreads();
  unsigned wrong = 0;
  for (unsigned row = 0; row < 64; row += 16) {
    for (unsigned chunk = 0; chunk < 8; chunk += 2) {
      uint32_t r[4];
      const uint32_t address = emu::smem_u32(s_tile + place(row + lane % 16, chunk + lane / 16));
      emu::ldmatrix<4, false>(r, address, {__FILE__, __LINE__});
      for (unsigned i = 0; i < 4; ++i) wrong += r[i] != (row + i % 2 * 8 + lane / 4) * 8 + chunk + i / 2;
      emu::stmatrix<4, false>(address, r, {__FILE__, __LINE__});
    }
  }
  args.array<unsigned>(0)[lane] = wrong;
}
