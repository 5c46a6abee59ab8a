// qkv_norm_rope: [q | k | v][t, h] = x[t] W[h]^T + b[h], 3 * head_dim rows of W per head, then
//                q = rope(LayerNorm(q)), k = rope(LayerNorm(k)), v as it is; k and v to their cache slots
//
// Tile      gemm.cuh; up to 16 tokens stream.cuh, in units of a part. A part: the q, k or v of one head. Every tile is
//           whole parts, so a part lies in one block, and all that follows the product happens where its fp32 sums are
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
#include "csrc/cuda/norm_rope.cuh"
#include "csrc/cuda/stream.cuh"

namespace persimmon_fast::cuda {
namespace {

enum class Access {
  kVectors,    // vectors of 16 bytes, aligned
  kUnaligned,  // the same columns per lane, moved one by one
  kElements,   // rotary_dim / 2 is not whole vectors: pairs of columns
};

// Columns `column` .. + kVec of a row of the staged product. kVec: kPiece, or 1.
template <typename Tile, int kVec>
DEV void load_staged(const Tile& tile, int row, int column, float (&values)[kVec]) {
  if constexpr (kVec == kPiece) {
    tile.load_piece(row, column, values);
  } else {
    static_assert(kVec == 1);
    values[0] = tile.at(row, column);
  }
}

template <typename scalar_t, int kHeadDim>
struct QkvEpilogue {
  NormRopeParams head;
  const scalar_t* bias;  // [num_heads * 3 * kHeadDim]; null: none
  QkvOutputs out;
  Access access;

  // Where part (q: 0, k: 1, v: 2) of a head of a token goes; null: nowhere.
  DEV scalar_t* target(int part, int64_t token, int64_t head_idx) const {
    if (part == 0) return static_cast<scalar_t*>(out.q) + (token * head.num_heads + head_idx) * kHeadDim;
    const int64_t slot = out.slot_mapping != nullptr ? out.slot_mapping[token] : token;
    if (slot < 0) return nullptr;
    // Unsigned: no sign to handle in the two divisions of 64 bits.
    const uint64_t page = static_cast<uint64_t>(slot) / static_cast<uint64_t>(out.page_size);
    const uint64_t in_page = static_cast<uint64_t>(slot) % static_cast<uint64_t>(out.page_size);
    const int64_t cache_row = (page * head.num_heads + head_idx) * out.page_size + in_page;
    return static_cast<scalar_t*>(part == 1 ? out.k : out.v) + cache_row * kHeadDim;
  }

  // One part of the tile's rows; column0: where it begins in the tile.
  template <bool kAligned, int kVec, typename Tile>
  DEV void finish_part(const Tile& tile, int column0) const {
    using Layout = HeadLayout<kHeadDim, kVec>;
    constexpr int kRowsPerPass = Tile::kThreads / Layout::kLanes;
    static_assert(Tile::kRows % kRowsPerPass == 0, "a pass must not leave the staged rows");
    const int64_t part_idx = (tile.col0 + column0) / kHeadDim;
    const int64_t head_idx = part_idx / 3;
    const int part = static_cast<int>(part_idx - head_idx * 3);
    const int half_rotary_dim = static_cast<int>(head.rotary_dim) / 2;
    const int rank = static_cast<int>(threadIdx.x) / Layout::kLanes;
    int row_in_pass = rank;
    if constexpr (kRowsPerPass % 4 == 0) {
      // Rows 0, 2, 1, 3: the two rows that a quarter warp reads (8 lanes of 16 bytes) then lie 16 banks apart.
      row_in_pass = (rank & ~3) | (rank & 1) << 1 | (rank >> 1 & 1);
    }
    for (int row0 = 0; row0 < tile.rows; row0 += kRowsPerPass) {
      const int row = row0 + row_in_pass;
      const bool is_active = row < tile.rows;  // the others take part in the shuffles, with zeros
      const int64_t token = tile.row0 + (is_active ? row : 0);
      const float* cos_sin = part < 2 ? cos_sin_row(head, token) : nullptr;
      HeadValues<kHeadDim, kVec> values;
#pragma unroll
      for (int i = 0; i < Layout::kPairs; ++i) {
        const int2 column = Layout::columns(i, half_rotary_dim);
        load_staged(tile, row, column0 + column.x, values.first[i]);
        load_staged(tile, row, column0 + column.y, values.second[i]);
      }
      if (bias != nullptr) {
        HeadValues<kHeadDim, kVec> r_bias;
        load_head<kAligned>(bias + part_idx * kHeadDim, half_rotary_dim, r_bias);
        add(values, r_bias);
      }
      if (part < 2) {
        norm_rope_head<scalar_t, kAligned>(values, head, part == 0 ? head.q_norm : head.k_norm, head_idx, cos_sin);
      }
      scalar_t* g_out = is_active ? target(part, token, head_idx) : nullptr;
      if (g_out != nullptr) store_head<kAligned>(g_out, half_rotary_dim, values);
    }
  }

  template <typename Tile>
  DEV void operator()(const Tile& tile) const {
    static_assert(Tile::kCols % kHeadDim == 0, "a tile must be whole head parts");
#pragma unroll 1
    for (int column0 = 0; column0 < tile.cols; column0 += kHeadDim) {
      if (access == Access::kVectors) {
        finish_part<true, kPiece>(tile, column0);
      } else if (access == Access::kUnaligned) {
        finish_part<false, kPiece>(tile, column0);
      } else {
        finish_part<false, 1>(tile, column0);
      }
    }
  }
};

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
