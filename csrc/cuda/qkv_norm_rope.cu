// qkv_norm_rope: [q | k | v][t, h] = x[t] W[h]^T + b[h], 3 * head_dim rows of W per head, then
//                q = rope(LayerNorm(q)), k = rope(LayerNorm(k)), v as it is; k and v to their cache slots
//
// Tile      gemm.cuh, on sm_90a gemm_sm90.cuh; up to 16 tokens stream.cuh, in units of a part. A part: the q, k or v of
//           one head. Every tile is whole parts, so a part lies in one block, and all that follows the product happens
//           where its fp32 sums are (qkv_epilogue.cuh)
//
//             columns of W   | q0 k0 | v0 q1 | k1 v1 | q2 ..      head_dim 64, tiles of 128: two parts each
//                            |  q0   |  k0   |  v0   | q1 ..      head_dim 128: one
//
//           Epilogue: 4 (head_dim 64) or 8 lanes take a part of a row, 16 columns each, as pairs of vectors that rotate
//           with each other (norm_rope.cuh); they walk down the rows of the tile
// Traffic   x and W as gemm.cuh; q, k, v written once, k and v where attention reads them: no projection in memory
// Bound     tensor cores from about 150 rows on; below, W
// Resources ptxas -v, registers per thread (sm_80; sm_90a), no spills and no stack on 8.0, 8.6, 8.9, 9.0a: 16-bit
//           128 x 128 242; 246, 64 x 128 168; 168, 64 x 64 116; 118; fp32 64 x 128 119; 123, 64 x 64 76; 71. Shared
//           memory as gemm.cuh: the epilogue adds none. Streamed: docs/kernels/stream.md
// Numerics  product, bias, statistics and rotary in fp32, one rounding. The bits of a token depend neither on the other
//           tokens nor on the tile, up to 16 tokens and above, and paged equals unpaged
// Requires  head_dim 64 or 128. Slots and positions within their ranges: no value is checked
// Measured  not run on a GPU yet
// Source    gemm.cuh, norm_rope.cuh; slots of a paged cache as in vLLM (Kwon et al. 2023, arXiv:2309.06180)
#include "csrc/cuda/qkv_norm_rope.h"

#include "csrc/cuda/dispatch.h"
#include "csrc/cuda/qkv_epilogue.cuh"
#include "csrc/cuda/stream.cuh"

namespace persimmon_fast::cuda {
namespace {

template <typename scalar_t, int kHeadDim>
cudaError_t launch_typed(const QkvNormRopeParams& p, cudaStream_t stream) {
  const GemmOperands operands{p.x,           p.weight,       p.head.num_tokens,  p.head.num_heads * 3 * kHeadDim,
                              p.hidden_size, p.x_row_stride, p.weight_row_stride};
  const bool aligned =
      is_aligned(p.head) && is_aligned(p.bias) && is_aligned(p.out.q) && is_aligned(p.out.k) && is_aligned(p.out.v);
  const bool has_whole_vectors = p.head.rotary_dim / 2 % kPiece == 0;
  const Access access = !has_whole_vectors ? Access::kElements : aligned ? Access::kVectors : Access::kUnaligned;
  const QkvEpilogue<scalar_t, kHeadDim> epilogue{p.head, static_cast<const scalar_t*>(p.bias), p.out, access};
  return launch_product<scalar_t, kHeadDim, kHeadDim>("qkv_norm_rope", operands, p.norm, epilogue,
                                                      p.num_multiprocessors, stream);
}

}  // namespace

cudaError_t launch_qkv_norm_rope(const QkvNormRopeParams& params, cudaStream_t stream) {
  return dispatch_dtype(params.head.dtype, [&](auto scalar) {
    return dispatch_head_dim(params.head.head_dim, [&](auto head_dim) {
      return launch_typed<decltype(scalar), decltype(head_dim)::value>(params, stream);
    });
  });
}

}  // namespace persimmon_fast::cuda
