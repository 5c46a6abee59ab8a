// What flash_attention.cu and paged_attention.cu share: where keys lie, loads into shared memory, fragments of a tile,
// and the attention of one query by one warp on CUDA cores.
#pragma once

#include <cfloat>
#include <cmath>

#include "csrc/cuda/attention_params.h"
#include "csrc/cuda/convert.cuh"
#include "csrc/cuda/device.cuh"
#include "csrc/cuda/ptx.cuh"
#include "csrc/cuda/reduce.cuh"

namespace persimmon_fast::cuda {

// Scores are kept as bare dot products, and weights are 2^(score * scale_log2 - maximum * scale_log2): one FMA each.
// That needs scale_log2 > 0, so a negative softmax_scale is moved to q, and 0 becomes a number so small that every
// product with a score below 1e30 gives the weight 2^0, while a masked score stays -inf.
constexpr float positive_scale_log2(const AttentionParams& p) {
  constexpr float kLog2E = 1.4426950408889634f;
  const float scale = (p.softmax_scale < 0.0f ? -p.softmax_scale : p.softmax_scale) * kLog2E;
  return scale == 0.0f ? FLT_MIN : scale;
}
DEV float q_sign(const AttentionParams& p) { return p.softmax_scale < 0.0f ? -1.0f : 1.0f; }

// maximum * scale_log2, and 0 where there is no maximum: -inf - -inf would be NaN.
DEV float scaled_maximum(float maximum, float scale_log2) { return maximum == -INFINITY ? 0.0f : maximum * scale_log2; }

// What turns weights relative to `from` into weights relative to `to` >= from. It compares the rounded products, as the
// weights did: with the exact one of `from` (an FMA: hence -fmad=false) two equal maxima would give a factor beside 1,
// the same again for every key.
DEV float rescale(float from, float to, float scale_log2) {
  if (from == -INFINITY) return to == -INFINITY ? 1.0f : 0.0f;
  return ptx::exp2_approx(scaled_maximum(from, scale_log2) - scaled_maximum(to, scale_log2));
}

// By how much a score exceeds the maximum before it replaces it: that is a weight of 2^8, for which fp32 sums and fp16
// weights have room. Bounded, so that -inf + slack stays -inf and any first maximum is taken.
constexpr float maximum_slack(float scale_log2) {
  constexpr float kMaxWeightLog2 = 8.0f;
  constexpr float kBound = 1e30f;
  return kMaxWeightLog2 < kBound * scale_log2 ? kMaxWeightLog2 / scale_log2 : kBound;
}

// Natural logarithm of a softmax denominator: -inf without keys, NaN stays NaN.
DEV float softmax_lse(const AttentionParams& p, float maximum, float denominator) {
  if (denominator == 0.0f) return -INFINITY;
  return maximum * fabsf(p.softmax_scale) + logf(denominator);
}

struct Sequence {
  int64_t q_begin;
  int64_t k_begin;
  int num_queries;
  int num_keys;
};

DEV Sequence load_sequence(const AttentionParams& p, int sequence_idx) {
  Sequence s;
  s.q_begin = p.cu_seqlens_q[sequence_idx];
  s.num_queries = p.cu_seqlens_q[sequence_idx + 1] - static_cast<int>(s.q_begin);
  s.k_begin = p.cu_seqlens_k != nullptr ? p.cu_seqlens_k[sequence_idx] : 0;
  s.num_keys = p.seqlens_k != nullptr ? p.seqlens_k[sequence_idx]
                                      : p.cu_seqlens_k[sequence_idx + 1] - static_cast<int>(s.k_begin);
  return s;
}

// Keys that query `query_idx` of a sequence sees: the first so many. Not positive: none.
DEV int num_visible_keys(const AttentionParams& p, const Sequence& s, int query_idx) {
  return p.causal ? min(s.num_keys, s.num_keys - s.num_queries + query_idx + 1) : s.num_keys;
}

// The keys, or the values, of one head of one sequence.
template <typename scalar_t>
struct Rows {
  const scalar_t* head;  // row 0, or with pages the head's row 0 of page 0
  int64_t token_stride;
  const int32_t* pages;  // null: not paged
  int page_size;
  int64_t page_stride;

  DEV const scalar_t* operator()(int key_idx) const {
    if (pages == nullptr) return head + key_idx * token_stride;
    const unsigned page_idx = static_cast<unsigned>(key_idx) / static_cast<unsigned>(page_size);
    return in_page(pages[page_idx], key_idx);
  }
  // With the page already looked up.
  DEV const scalar_t* in_page(int page, int key_idx) const {
    const int slot = static_cast<int>(static_cast<unsigned>(key_idx) % static_cast<unsigned>(page_size));
    return head + page * page_stride + slot * token_stride;
  }
};

template <typename scalar_t>
DEV Rows<scalar_t> rows_of(const AttentionParams& p, const Sequence& s, int sequence_idx, int head_idx,
                           const void* base, int64_t token_stride, int64_t head_stride) {
  Rows<scalar_t> rows;
  rows.head = static_cast<const scalar_t*>(base) + s.k_begin * token_stride + head_idx * head_stride;
  rows.token_stride = token_stride;
  rows.pages = p.page_table == nullptr ? nullptr : p.page_table + sequence_idx * p.page_table_stride;
  rows.page_size = p.page_size;
  rows.page_stride = p.page_stride;
  return rows;
}
template <typename scalar_t>
DEV Rows<scalar_t> key_rows(const AttentionParams& p, const Sequence& s, int sequence_idx, int head_idx) {
  return rows_of<scalar_t>(p, s, sequence_idx, head_idx, p.k, p.k_token_stride, p.k_head_stride);
}
template <typename scalar_t>
DEV Rows<scalar_t> value_rows(const AttentionParams& p, const Sequence& s, int sequence_idx, int head_idx) {
  return rows_of<scalar_t>(p, s, sequence_idx, head_idx, p.v, p.v_token_stride, p.v_head_stride);
}
template <typename scalar_t>
DEV const scalar_t* query_row(const AttentionParams& p, const Sequence& s, int head_idx, int query_idx) {
  return static_cast<const scalar_t*>(p.q) + (s.q_begin + query_idx) * p.q_token_stride + head_idx * p.q_head_stride;
}
template <typename scalar_t, int kHeadDim>
DEV scalar_t* out_row(const AttentionParams& p, const Sequence& s, int head_idx, int query_idx) {
  return static_cast<scalar_t*>(p.out) + ((s.q_begin + query_idx) * p.num_heads + head_idx) * kHeadDim;
}

// Tiles in shared memory: rows of kHeadDim 16-bit elements, cut into chunks of 16 bytes. Chunk c of row r lies at place
// c ^ (r % 8), so that the eight rows which one phase of ldmatrix reads at one c lie in all 32 banks.
template <int kHeadDim>
struct Tile {
  static constexpr int kChunks = kHeadDim / 8;
  static constexpr int kRowBytes = kHeadDim * 2;
  static_assert(kChunks >= 8, "the swizzle permutes eight chunks");

  DEV static int offset(int row, int chunk) { return row * kRowBytes + ((chunk ^ (row % 8)) * 16); }  // bytes

  // The B fragments (mma: K x N) of 16 keys x 16 dims, keys being N: r[0..1] keys 0-7, r[2..3] keys 8-15.
  DEV static void load_keys(uint32_t (&r)[4], uint32_t s_tile, int key, int dim, int lane) {
    const int row = lane % 8 + lane / 16 * 8;
    ptx::ldmatrix(r, s_tile + (key + row) * kRowBytes + (((dim / 8) ^ ((lane / 8 % 2) ^ (lane % 8))) * 16));
  }
  // The B fragments of 16 keys x 16 dims, dims being N: r[0..1] dims 0-7, r[2..3] dims 8-15.
  DEV static void load_values(uint32_t (&r)[4], uint32_t s_tile, int key, int dim, int lane) {
    ptx::ldmatrix_trans(r, s_tile + (key + lane % 16) * kRowBytes + (((dim / 8) ^ ((lane / 16) ^ (lane % 8))) * 16));
  }
  // The A fragment (mma: M x K) of 16 rows x 16 dims.
  DEV static void load_queries(uint32_t (&r)[4], uint32_t s_tile, int row, int dim, int lane) {
    ptx::ldmatrix(r, s_tile + (row + lane % 16) * kRowBytes + (((dim / 8) ^ ((lane / 16) ^ (lane % 8))) * 16));
  }
};

// 16 bytes of a row to s_chunk; zeros, without a read, where it is not valid. aligned: asynchronous (cp.async).
template <typename scalar_t>
DEV void copy_chunk(unsigned char* s_chunk, const scalar_t* g_chunk, bool valid, bool aligned) {
  if (aligned) {
    ptx::cp_async16(ptx::smem_u32(s_chunk), g_chunk, valid ? 16 : 0);
  } else {
    Chunk<scalar_t> chunk{};
    if (valid) chunk = load_chunk<false>(g_chunk, Chunk<scalar_t>::kSize);
    *reinterpret_cast<Chunk<scalar_t>*>(s_chunk) = chunk;
  }
}

// Two B fragments of one ldmatrix.x4 against the A fragment: d0 += a b[0..1], d1 += a b[2..3].
template <typename scalar_t>
DEV void mma_pair(float (&d0)[4], float (&d1)[4], const uint32_t (&a)[4], const uint32_t (&b)[4]) {
  const uint32_t b0[2] = {b[0], b[1]};
  const uint32_t b1[2] = {b[2], b[3]};
  ptx::mma(d0, a, b0, scalar_t());
  ptx::mma(d1, a, b1, scalar_t());
}

// The lanes 4 g .. 4 g + 3 of a warp hold row g of an accumulator.
DEV float quad_max(float value) {
  value = fmaxf(value, __shfl_xor_sync(kFullMask, value, 1));
  return fmaxf(value, __shfl_xor_sync(kFullMask, value, 2));
}
DEV float quad_sum(float value) {
  value += __shfl_xor_sync(kFullMask, value, 1);
  return value + __shfl_xor_sync(kFullMask, value, 2);
}

// Online softmax of one row of a tile, of which this lane holds scores[n][i] and scores[n][i + 1], as accumulators lie:
// they become weights relative to `maximum`. Returns the factor of what was added up before; mostly 1, see
// maximum_slack.
template <int kTiles>
DEV float softmax_row(float (&scores)[kTiles][4], int i, float& maximum, float& denominator, float scale_log2,
                      float slack) {
  float tile_maximum = -INFINITY;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) tile_maximum = fmaxf(tile_maximum, fmaxf(scores[n][i], scores[n][i + 1]));
  tile_maximum = quad_max(tile_maximum);
  const bool moves = tile_maximum > maximum + slack;
  const float correction = moves ? rescale(maximum, tile_maximum, scale_log2) : 1.0f;
  if (moves) maximum = tile_maximum;
  const float offset = scaled_maximum(maximum, scale_log2);
  float sum = 0.0f;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int j = i; j < i + 2; ++j) {
      scores[n][j] = ptx::exp2_approx(fmaf(scores[n][j], scale_log2, -offset));
      sum += scores[n][j];
    }
  }
  denominator = fmaf(denominator, correction, sum);
  return correction;
}

// One query by one warp, on CUDA cores: lane l works on keys begin + l / 8 + 4 i and dims l % 8 + 8 j.
template <int kHeadDim>
struct RowAttention {
  static constexpr int kDims = kHeadDim / 8;
  float maximum = -INFINITY;
  float denominator = 0.0f;
  float acc[kDims] = {};  // of dims lane % 8 + 8 j, the same in the four lanes that share lane % 8

  template <typename scalar_t>
  DEV void run(const AttentionParams& p, const scalar_t* g_q, const Rows<scalar_t>& k, const Rows<scalar_t>& v,
               int begin, int end) {
    const int lane = threadIdx.x % kWarpSize;
    const float scale_log2 = positive_scale_log2(p);
    const float sign = q_sign(p);
    float r_q[kDims];
#pragma unroll
    for (int j = 0; j < kDims; ++j) r_q[j] = sign * to_float(g_q[lane % 8 + 8 * j]);

#pragma unroll 1
    for (int first = begin; first < end; first += 4) {
      const int key_idx = first + lane / 8;
      float score = 0.0f;
      if (key_idx < end) {
        const scalar_t* g_k = k(key_idx) + lane % 8;
#pragma unroll
        for (int j = 0; j < kDims; ++j) score = fmaf(r_q[j], to_float(g_k[8 * j]), score);
      }
      score = sum_lanes<8>(score);
      if (key_idx >= end) continue;
      const float new_maximum = fmaxf(maximum, score);
      const float offset = scaled_maximum(new_maximum, scale_log2);
      const float correction = rescale(maximum, new_maximum, scale_log2);
      const float weight = ptx::exp2_approx(fmaf(score, scale_log2, -offset));
      maximum = new_maximum;
      denominator = fmaf(denominator, correction, weight);
      const scalar_t* g_v = v(key_idx) + lane % 8;
#pragma unroll
      for (int j = 0; j < kDims; ++j) acc[j] = fmaf(weight, to_float(g_v[8 * j]), acc[j] * correction);
    }

    float row_maximum = maximum;
#pragma unroll
    for (int lane_mask = 8; lane_mask <= 16; lane_mask *= 2) {
      row_maximum = fmaxf(row_maximum, __shfl_xor_sync(kFullMask, row_maximum, lane_mask));
    }
    const float weight = rescale(maximum, row_maximum, scale_log2);
    maximum = row_maximum;
    denominator = sum_of_groups(denominator * weight);
#pragma unroll
    for (int j = 0; j < kDims; ++j) acc[j] = sum_of_groups(acc[j] * weight);
  }

  // Writes acc * factor: dim d to to[d].
  template <typename out_t>
  DEV void store(out_t* to, float factor) const {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int j = 0; j < kDims; ++j) {
      if (j % 4 == lane / 8) from_float(acc[j] * factor, to[lane % 8 + 8 * j]);
    }
  }

 private:
  DEV static float sum_of_groups(float value) {
    value += __shfl_xor_sync(kFullMask, value, 8);
    return value + __shfl_xor_sync(kFullMask, value, 16);
  }
};

// 1 / denominator, and 0 for a query without keys.
DEV float reciprocal(float denominator) { return denominator == 0.0f ? 0.0f : 1.0f / denominator; }

// A masked key weighs 0, but 0 * NaN is NaN: where a row is not finite and the mask may have hidden a value from it,
// the row is done again, exactly, from the keys that it sees. By a warp, for its rows first_row .. first_row + 7;
// `lanes`: a bit for each lane that holds a value of such a row.
template <typename scalar_t, int kHeadDim>
DEV void repeat_rows(const AttentionParams& p, const Sequence& s, int head_idx, int first_row, unsigned lanes,
                     const Rows<scalar_t>& k, const Rows<scalar_t>& v) {
  if (lanes == 0) return;
#pragma unroll 1
  for (int g = 0; g < 8; ++g) {
    if ((lanes >> (4 * g) & 0xfu) == 0) continue;
    const int row = first_row + g;
    RowAttention<kHeadDim> exact;
    exact.run(p, query_row<scalar_t>(p, s, head_idx, row), k, v, 0, num_visible_keys(p, s, row));
    exact.store(out_row<scalar_t, kHeadDim>(p, s, head_idx, row), reciprocal(exact.denominator));
  }
}

template <typename scalar_t>
bool rows_are_aligned(const AttentionParams& p) {
  constexpr int64_t kChunk = Chunk<scalar_t>::kSize;
  for (const int64_t stride : {p.q_token_stride, p.q_head_stride, p.k_token_stride, p.k_head_stride, p.v_token_stride,
                               p.v_head_stride, p.page_stride}) {
    if (stride % kChunk != 0) return false;
  }
  return is_aligned(p.q) && is_aligned(p.k) && is_aligned(p.v);
}

}  // namespace persimmon_fast::cuda
