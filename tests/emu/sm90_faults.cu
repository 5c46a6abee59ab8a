// One kernel per mistake with the instructions of sm_90a, as faults.cu. Those of a whole pipeline: sm90_gemm.cu.
#include "tests/emu/sm90_kernel.h"

// ---- the asynchronous proxy ----

// What threads wrote to shared memory, read by wgmma.
SM90_CASE(missing_proxy_fence, no_maps, 1, 128, 1, 2 * 8192) {
  SMEM_CARVER(smem);
  uint32_t* s_tiles = smem.take<uint32_t>(2 * 8192 / 4, 1024);
  for (unsigned i = threadIdx.x; i < 2 * 8192 / 4; i += 128) s_tiles[i] = 0;
  if (!args.broken()) ptx::fence_proxy_async();
  __syncthreads();
  float d[32];
  const uint32_t at = ptx::smem_u32(s_tiles);
  ptx::wgmma_fence();
  ptx::wgmma_ss<0>(d, ptx::wgmma_operand(at), ptx::wgmma_operand(at + 8192), false, __half{});
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  args.array<float>(0)[threadIdx.x] = d[0];
}
