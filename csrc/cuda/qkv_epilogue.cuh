// The epilogue of qkv_norm_rope: bias, LayerNorm of q and k, rotary embedding, cache write (qkv_norm_rope.cu).
#pragma once

#include "csrc/cuda/gemm_epilogue.cuh"
#include "csrc/cuda/gemm_sm90_epilogue.cuh"
#include "csrc/cuda/norm_rope.cuh"

namespace persimmon_fast::cuda {

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

  // A part of the columns of W.
  struct Part {
    int64_t index;
    int64_t head_idx;
    int kind;  // q: 0, k: 1, v: 2

    DEV explicit Part(int64_t column) : index(column / kHeadDim), head_idx(index / 3) {
      kind = static_cast<int>(index - head_idx * 3);
    }
  };

  DEV const HeadNorm& norm(const Part& part) const { return part.kind == 0 ? head.q_norm : head.k_norm; }

  // Row of a token's first head in the cache; negative: the token is not kept.
  DEV int64_t cache_row(int64_t token) const {
    const int64_t slot = out.slot_mapping != nullptr ? out.slot_mapping[token] : token;
    if (slot < 0) return -1;
    // Unsigned: no sign to handle in the two divisions of 64 bits.
    const uint64_t page = static_cast<uint64_t>(slot) / static_cast<uint64_t>(out.page_size);
    const uint64_t in_page = static_cast<uint64_t>(slot) % static_cast<uint64_t>(out.page_size);
    return page * head.num_heads * out.page_size + in_page;
  }

  // Where a part goes; null: nowhere. row: of the token's first head, in q token * num_heads, else cache_row().
  DEV scalar_t* target(const Part& part, int64_t row) const {
    void* rows = part.kind == 0 ? out.q : part.kind == 1 ? out.k : out.v;
    const int64_t head_stride = part.kind == 0 ? 1 : out.page_size;
    return row < 0 ? nullptr : static_cast<scalar_t*>(rows) + (row + part.head_idx * head_stride) * kHeadDim;
  }

  // In the accumulators of wgmma, columns that rotate with each other lie in one thread if blocks of 8 do.
  bool finishes_on_sm90() const { return access == Access::kVectors && head.rotary_dim == kHeadDim / 2; }

  // One part of the tile's rows; column0: where it begins in the tile.
  template <bool kAligned, int kVec, typename Tile>
  DEV void finish_part(const Tile& tile, int column0) const {
    using Layout = HeadLayout<kHeadDim, kVec>;
    constexpr int kRowsPerPass = Tile::kThreads / Layout::kLanes;
    static_assert(Tile::kRows % kRowsPerPass == 0, "a pass must not leave the staged rows");
    const Part part(tile.col0 + column0);
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
      const float* cos_sin = part.kind < 2 ? cos_sin_row(head, token) : nullptr;
      HeadValues<kHeadDim, kVec> values;
#pragma unroll
      for (int i = 0; i < Layout::kPairs; ++i) {
        const int2 column = Layout::columns(i, half_rotary_dim);
        load_staged(tile, row, column0 + column.x, values.first[i]);
        load_staged(tile, row, column0 + column.y, values.second[i]);
      }
      if (bias != nullptr) {
        HeadValues<kHeadDim, kVec> r_bias;
        load_head<kAligned>(bias + part.index * kHeadDim, half_rotary_dim, r_bias);
        add(values, r_bias);
      }
      if (part.kind < 2) norm_rope_head<scalar_t, kAligned>(values, head, norm(part), part.head_idx, cos_sin);
      const int64_t out_row = part.kind == 0 ? token * head.num_heads : cache_row(token);
      scalar_t* g_out = is_active ? target(part, out_row) : nullptr;
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

// ---- on sm_90a: in the accumulators of wgmma ----

// A part of 16 rows: of row h, column 8 j + 2 (lane % 4) + e at [h][2 j + e].
template <int kHeadDim>
using PartValues = float[2][kHeadDim / 4];

// values = (values - mean) * rstd * weight + bias, as norm_head (norm_rope.cuh) but for the order of additions.
template <typename scalar_t, int kHeadDim>
DEV void norm_part(PartValues<kHeadDim>& values, const scalar_t* weight, const scalar_t* bias, float eps, int lane) {
  constexpr int kValues = kHeadDim / 4;
  // Four sums side by side, of both rows and of even and odd columns: an addition takes four clocks.
  float total[2][2] = {};
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) total[h][i % 2] += values[h][i];
  }
  float rough_mean[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) rough_mean[h] = sum_lanes<4>(total[h][0] + total[h][1]) / kHeadDim;
  float deviation[2][2] = {};
  float square[2][2] = {};
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float& value = values[h][i];
      value -= rough_mean[h];
      deviation[h][i % 2] += value;
      square[h][i % 2] = fmaf(value, value, square[h][i % 2]);
    }
  }
  Normalisation n[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    n[h] = normalisation<kHeadDim>(sum_lanes<4>(deviation[h][0] + deviation[h][1]),
                                   sum_lanes<4>(square[h][0] + square[h][1]), eps);
  }
  const scalar_t* g_weight = weight + lane % 4 * 2;
  const scalar_t* g_bias = bias + lane % 4 * 2;
#pragma unroll
  for (int j = 0; j < kHeadDim / 8; ++j) {
    const float2 w = load_pair(g_weight + j * 8);
    const float2 b = load_pair(g_bias + j * 8);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float* pair = &values[h][2 * j];
      pair[0] = fmaf(fmaf(pair[0], n[h].rstd, n[h].shift), w.x, b.x);
      pair[1] = fmaf(fmaf(pair[1], n[h].rstd, n[h].shift), w.y, b.y);
    }
  }
}

// Columns 0 .. kHeadDim / 2 rotate, the first half of them with the second. cos_sin: of the two rows of this lane.
template <int kHeadDim>
DEV void rope_part(PartValues<kHeadDim>& values, const float* const (&cos_sin)[2], int lane) {
  constexpr int kHalf = kHeadDim / 4;  // of the columns that rotate
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int j = 0; j < kHalf / 8; ++j) {
      const float* g_cos = cos_sin[h] + lane % 4 * 2 + j * 8;
      const float2 cos = *reinterpret_cast<const float2*>(g_cos);
      const float2 sin = *reinterpret_cast<const float2*>(g_cos + kHalf);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& first = values[h][2 * j + e];
        float& second = values[h][2 * (j + kHalf / 8) + e];
        rotate(first, second, e == 0 ? cos.x : cos.y, e == 0 ? sin.x : sin.y);
      }
    }
  }
}

template <typename scalar_t, int kHeadDim, int kCols>
DEV void finish(const QkvEpilogue<scalar_t, kHeadDim>& epilogue, const WarpTile<kCols>& tile) {
  using Part = typename QkvEpilogue<scalar_t, kHeadDim>::Part;
  static_assert(kCols % kHeadDim == 0, "a tile must be whole head parts");
  constexpr int kPartBlocks = kHeadDim / 8;
  const int lane = tile.lane;
  const float* cos_sin[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = min(h * 8 + lane / 4, tile.rows - 1);  // rows outside take part in the shuffles
    cos_sin[h] = cos_sin_row(epilogue.head, tile.row0 + row);
  }
  // Of row lane % 16: where its first head goes.
  const int64_t token = tile.row0 + min(lane % kSlabRows, tile.rows - 1);
  const int64_t q_row = token * epilogue.head.num_heads;
  const int64_t cache_row = epilogue.cache_row(token);
#pragma unroll
  for (int first = 0; first < kCols; first += kHeadDim) {
    if (first >= tile.cols) break;
    const Part part(tile.col0 + first);
    PartValues<kHeadDim> values;
    const scalar_t* g_bias =
        epilogue.bias != nullptr ? epilogue.bias + part.index * kHeadDim + tile.first_column() : nullptr;
#pragma unroll
    for (int j = 0; j < kPartBlocks; ++j) {
      const float2 bias = load_pair(g_bias + j * 8, g_bias != nullptr);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        values[i / 2][2 * j + i % 2] = tile.acc[(first / 8 + j) * 4 + i] + (i % 2 == 0 ? bias.x : bias.y);
      }
    }
    if (part.kind < 2) {
      const HeadNorm& norm = epilogue.norm(part);
      if (norm.weight != nullptr) {
        const int64_t offset = part.head_idx * norm.head_stride;
        norm_part<scalar_t, kHeadDim>(values, static_cast<const scalar_t*>(norm.weight) + offset,
                                      static_cast<const scalar_t*>(norm.bias) + offset, epilogue.head.eps, lane);
      }
      rope_part<kHeadDim>(values, cos_sin, lane);
    }
#pragma unroll
    for (int j = 0; j < kPartBlocks; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) tile.acc[(first / 8 + j) * 4 + i] = values[i / 2][2 * j + i % 2];
    }
    scalar_t* g_rows[WarpSlab::kPasses];
#pragma unroll
    for (int pass = 0; pass < WarpSlab::kPasses; ++pass) {
      const int64_t row = __shfl_sync(kFullMask, part.kind == 0 ? q_row : cache_row, pass * 4 + lane / 8);
      g_rows[pass] = epilogue.target(part, row);
    }
#pragma unroll
    for (int slab = 0; slab < kHeadDim / kSlabCols; ++slab) {
      tile.template store_slab<scalar_t>(first / kSlabCols + slab, [&](int pass) {
        return g_rows[pass] == nullptr ? nullptr : g_rows[pass] + slab * kSlabCols;
      });
    }
  }
}

}  // namespace persimmon_fast::cuda
