// attention: out[t, h] = sum_j softmax_j(softmax_scale q[t, h] . k[j, h]) v[j, h]     j: the keys that query t sees
//
// Work      one sequence, one head, up to 64 queries; key tiles of up to 64 keys (never across a page), online
//           softmax. Up to 16 queries: cut further into 2,048 keys, partial results merged by attention_combine
// Scores    up to 4 queries: one register of keys at a time, a dot product each, summed by a register transpose;
//           more: the tile of K is transposed to fp32 once and multiplied as a matrix. Then P V as a matrix
// Traffic   decode: K and V once. One stream of misses does not fill the memory's bandwidth, and hardware
//           prefetchers stop at 4 KB: software prefetch walks K and V of the next four tiles in lockstep, eight
//           streams. Splits are the outer loop over heads: the TLB and page-table lines of a split's pages still
//           serve the next head
// Bound     memory for one query per sequence, fp32 FMA for many
// Numerics  q pre-scaled in fp32; scores, softmax, weights and sums in fp32, rounded once. A key that a query does
//           not see is left out, not multiplied by zero: a NaN there cannot reach it. No keys: out 0, lse -inf
// Measured  share of the read bandwidth of the same run (16 GB/s), 64 heads x 64, bf16, 1 thread, CPU time: one query
//           0.83-0.89 at 2,048 and 16,384 keys (prefetch of the next tile only: 0.58, 0.49; heads as the outer
//           loop: 0.84, 0.74); 4 queries 0.64, 8 queries 0.40, 16 queries 0.27 (bound by arithmetic). 2,048 tokens,
//           16 heads, causal: 109 GFLOP/s bf16, 103 fp16, 82 fp32. Sapphire-Rapids-class Xeon (fp32 peak at 2.6 GHz:
//           166), 2026-11
// Source    Dao et al. 2022, FlashAttention, arXiv:2205.14135; Milakov and Gimelshein 2018, Online normalizer
//           calculation for softmax, arXiv:1805.02867; splits as in Flash-Decoding (Dao et al. 2023)
#include "csrc/cpu/attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "csrc/cpu/transpose.h"
#include "csrc/cpu/vec.h"

namespace persimmon_fast::cpu::PF_ISA {
namespace {

constexpr int kW = Vec::kWidth;
constexpr int kTileKeys = 64;
constexpr int kMaxDim = static_cast<int>(kAttentionMaxHeadDim);
constexpr int kMaxRows = static_cast<int>(kAttentionQueryBlock);
constexpr int kAhead = 4;       // tiles that are prefetched
constexpr int kDirectRows = 4;  // up to here K and V are used as they lie; above, they are converted once per tile
constexpr float kMinusInf = -std::numeric_limits<float>::infinity();
// Matrix products keep 4 rows x kGroup registers of sums: 16 of 32 registers with AVX-512, 8 of 16 with AVX2.
constexpr int kGroup = kW == 16 ? 4 : 2;

// Everything of one work item; about 150 KB, so on the stack of the thread and in its L2.
struct Scratch {
  alignas(64) float q[kMaxRows * kMaxDim];              // [row][head_dim padded], times softmax_scale
  alignas(64) float acc[kMaxRows * kMaxDim];            // [row][head_dim padded], sum of weight * v
  alignas(64) float weights[kMaxRows * kTileKeys];      // [row][key], scores, then exp(score - max)
  alignas(64) float k_transposed[kMaxDim * kTileKeys];  // [dim][key]
  alignas(64) float v_wide[kTileKeys * kMaxDim];        // [key][head_dim padded]
  float max[kMaxRows];
  float sum[kMaxRows];
};

template <typename T>
struct KeyTile {
  const T* k;
  const T* v;
  int count;
  int prefetched;  // keys
};

template <typename T>
KeyTile<T> key_tile(const AttentionParams& p, const AttentionSequence& s, int64_t head, int64_t key, int64_t end) {
  int64_t page = 0;
  int64_t row = s.k_begin + key;
  int64_t count = std::min<int64_t>(kTileKeys, end - key);
  if (s.pages != nullptr) {
    page = s.pages[key / p.page_size];
    row = key % p.page_size;
    count = std::min(count, p.page_size - row);
  }
  return {static_cast<const T*>(p.k) + page * p.k_page_stride + head * p.k_head_stride + row * p.k_token_stride,
          static_cast<const T*>(p.v) + page * p.v_page_stride + head * p.v_head_stride + row * p.v_token_stride,
          static_cast<int>(count), 0};
}

// One step of the prefetch: a few keys of each tile ahead. A tile of 64 keys takes 2 * 64 / kW steps to compute and
// is complete after four times as many.
template <typename T>
inline void prefetch_step(const AttentionParams& p, KeyTile<T> (&ahead)[kAhead]) {
  constexpr int64_t kLine = 64 / sizeof(T);
  constexpr int kKeysPerStep = kW / (2 * kAhead);
  static_assert(kKeysPerStep >= 1, "a step must make progress");
  for (KeyTile<T>& tile : ahead) {
    const int stop = std::min(tile.prefetched + kKeysPerStep, tile.count);
    for (; tile.prefetched < stop; ++tile.prefetched) {
      for (int64_t d = 0; d < p.head_dim; d += kLine) {
        __builtin_prefetch(tile.k + tile.prefetched * p.k_token_stride + d);
        __builtin_prefetch(tile.v + tile.prefetched * p.v_token_stride + d);
      }
    }
  }
}

// c[r][0 .. kVecs * kW) = (kAdd ? c : 0) + sum_i a[r][i] b[i][..]; lanes: how many of the last register exist in b.
template <bool kAdd, int kRows, int kVecs, typename B>
inline void multiply_block(const float* a, int64_t a_stride, const B* b, int64_t b_stride, int depth, float* c,
                           int64_t c_stride, int lanes) {
  Vec sums[kRows][kVecs];
  for (int r = 0; r < kRows; ++r) {
    for (int n = 0; n < kVecs; ++n) sums[r][n] = kAdd ? load(c + r * c_stride + n * kW) : Vec::zero();
  }
  for (int i = 0; i < depth; ++i) {
    Vec row[kVecs];
    for (int n = 0; n < kVecs; ++n) {
      const B* from = b + i * b_stride + n * kW;
      row[n] = n + 1 < kVecs || lanes == kW ? load(from) : load_n(from, lanes);
    }
    for (int r = 0; r < kRows; ++r) {
      const Vec weight = Vec::set1(a[r * a_stride + i]);
      for (int n = 0; n < kVecs; ++n) sums[r][n] = fma(weight, row[n], sums[r][n]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int n = 0; n < kVecs; ++n) store(c + r * c_stride + n * kW, sums[r][n]);
  }
}

template <bool kAdd, int kVecs, typename B>
inline void multiply_columns(int rows, const float* a, int64_t a_stride, const B* b, int64_t b_stride, int depth,
                             float* c, int64_t c_stride, int lanes) {
  int r = 0;
  for (; r + 4 <= rows; r += 4) {
    multiply_block<kAdd, 4, kVecs>(a + r * a_stride, a_stride, b, b_stride, depth, c + r * c_stride, c_stride, lanes);
  }
  a += r * a_stride;
  c += r * c_stride;
  if (rows - r == 3) multiply_block<kAdd, 3, kVecs>(a, a_stride, b, b_stride, depth, c, c_stride, lanes);
  if (rows - r == 2) multiply_block<kAdd, 2, kVecs>(a, a_stride, b, b_stride, depth, c, c_stride, lanes);
  if (rows - r == 1) multiply_block<kAdd, 1, kVecs>(a, a_stride, b, b_stride, depth, c, c_stride, lanes);
}

// c[rows][columns] = (kAdd ? c : 0) + a[rows][depth] b[depth][columns]; rows of c are padded to whole registers.
template <bool kAdd, typename B>
inline void multiply(int rows, int columns, int depth, const float* a, int64_t a_stride, const B* b, int64_t b_stride,
                     float* c, int64_t c_stride) {
  int n = 0;
  for (; n + kGroup * kW <= columns; n += kGroup * kW) {
    multiply_columns<kAdd, kGroup>(rows, a, a_stride, b + n, b_stride, depth, c + n, c_stride, kW);
  }
  for (; n < columns; n += kW) {
    const int lanes = std::min(kW, columns - n);
    multiply_columns<kAdd, 1>(rows, a, a_stride, b + n, b_stride, depth, c + n, c_stride, lanes);
  }
}

// kW dot products of head_dim = kVecs * kW.
template <int kVecs, typename T>
inline void dot_rows(const float* q, const T* k, int64_t stride, Vec (&sums)[kW]) {
  Vec query[kVecs];
  for (int n = 0; n < kVecs; ++n) query[n] = load(q + n * kW);
#pragma GCC unroll 16
  for (int j = 0; j < kW; ++j) {
    sums[j] = load(k + j * stride) * query[0];
    for (int n = 1; n < kVecs; ++n) sums[j] = fma(load(k + j * stride + n * kW), query[n], sums[j]);
  }
}

// Scores of one query against the kW keys at k; keys from count on are not read.
template <typename T>
inline Vec dot_keys(const float* q, const T* k, int64_t stride, int count, int head_dim) {
  Vec sums[kW];
  if (count >= kW && head_dim == 4 * kW) {
    dot_rows<4>(q, k, stride, sums);
  } else if (count >= kW && head_dim == 8 * kW) {
    dot_rows<8>(q, k, stride, sums);
  } else {
    for (int j = 0; j < kW; ++j) {
      sums[j] = Vec::zero();
      for (int d = 0; d < head_dim && j < count; d += kW) {
        sums[j] = fma(load_n(k + j * stride + d, std::min(kW, head_dim - d)), load(q + d), sums[j]);
      }
    }
  }
  return reduce_add_each(sums);
}

// k_transposed[d][j] = k[j][d]; keys past count become 0.
template <typename T>
inline void transpose_keys(const T* k, int64_t stride, int begin, int count, int head_dim, float* k_transposed) {
  for (int d = 0; d < head_dim; d += kW) {
    const int lanes = std::min(kW, head_dim - d);
    Vec block[kW];
    for (int j = 0; j < kW; ++j) {
      const T* row = k + (begin + j) * stride + d;
      block[j] = begin + j >= count ? Vec::zero() : lanes == kW ? load(row) : load_n(row, lanes);
    }
    transpose(block);
    for (int i = 0; i < lanes; ++i) store(k_transposed + (d + i) * kTileKeys + begin, block[i]);
  }
}

template <typename T>
inline void widen_row(const T* row, int head_dim, float* out) {
  for (int d = 0; d < head_dim; d += kW) {
    const int lanes = std::min(kW, head_dim - d);
    store(out + d, lanes == kW ? load(row + d) : load_n(row + d, lanes));
  }
}

// scores[j] -> exp(scores[j] - max) for j < visible, 0 up to padded; updates max, sum and acc (the online softmax).
inline void softmax_row(float* scores, int visible, int padded, float& max, float& sum, float* acc, int head_dim) {
  for (int j = visible; j < padded; ++j) scores[j] = kMinusInf;
  Vec tile_max = Vec::set1(kMinusInf);
  for (int j = 0; j < padded; j += kW) tile_max = persimmon_fast::cpu::PF_ISA::max(tile_max, load(scores + j));
  const float new_max = std::max(max, reduce_max(tile_max));
  const float shift = new_max == kMinusInf ? 0.0f : new_max;  // all scores -inf: weights 0, not NaN
  Vec tile_sum = Vec::zero();
  for (int j = 0; j < padded; j += kW) {
    const Vec weight = exp(load(scores + j) - Vec::set1(shift));
    tile_sum = tile_sum + weight;
    store(scores + j, weight);
  }
  const float rescale = std::exp(max - shift);
  if (rescale != 1.0f) {
    for (int d = 0; d < head_dim; d += kW) store(acc + d, load(acc + d) * Vec::set1(rescale));
  }
  sum = sum * rescale + reduce_add(tile_sum);
  max = new_max;
}

inline int64_t visible_keys(const AttentionParams& p, const AttentionSequence& s, int64_t query) {
  return p.causal ? std::clamp<int64_t>(s.num_keys - s.num_queries + query + 1, 0, s.num_keys) : s.num_keys;
}

// Keys [begin, end) for queries [first_query, first_query + rows) of one head: leaves acc, max and sum in scratch.
template <typename T>
void attend(const AttentionParams& p, const AttentionSequence& s, int64_t head, int64_t first_query, int rows,
            int64_t begin, int64_t end, Scratch& scratch) {
  const int head_dim = static_cast<int>(p.head_dim);
  const int padded_dim = (head_dim + kW - 1) / kW * kW;
  const bool direct = rows <= kDirectRows;
  for (int r = 0; r < rows; ++r) {
    const T* q = static_cast<const T*>(p.q) + (s.q_begin + first_query + r) * p.q_token_stride + head * p.q_head_stride;
    for (int d = 0; d < head_dim; d += kW) {
      const Vec wide = load_n(q + d, std::min(kW, head_dim - d));
      store(scratch.q + r * padded_dim + d, wide * Vec::set1(p.softmax_scale));
      store(scratch.acc + r * padded_dim + d, Vec::zero());
    }
    scratch.max[r] = kMinusInf;
    scratch.sum[r] = 0.0f;
  }
  end = std::min(end, visible_keys(p, s, first_query + rows - 1));
  if (begin >= end) return;
  int64_t ahead_key = begin;
  const auto next_tile = [&] {
    const KeyTile<T> next = ahead_key < end ? key_tile<T>(p, s, head, ahead_key, end) : KeyTile<T>{};
    ahead_key += next.count;
    return next;
  };
  KeyTile<T> tile = next_tile();
  KeyTile<T> ahead[kAhead];
  for (KeyTile<T>& next : ahead) next = next_tile();
  for (int64_t key = begin; key < end;) {
    const int padded_count = (tile.count + kW - 1) / kW * kW;

    for (int j = 0; j < tile.count; j += kW) {
      prefetch_step(p, ahead);
      if (direct) {
        for (int r = 0; r < rows; ++r) {
          store(scratch.weights + r * kTileKeys + j, dot_keys(scratch.q + r * padded_dim, tile.k + j * p.k_token_stride,
                                                              p.k_token_stride, tile.count - j, head_dim));
        }
      } else {
        transpose_keys(tile.k, p.k_token_stride, j, tile.count, head_dim, scratch.k_transposed);
      }
    }
    if (!direct) {
      multiply<false>(rows, padded_count, head_dim, scratch.q, padded_dim, scratch.k_transposed, kTileKeys,
                      scratch.weights, kTileKeys);
    }

    const auto visible = [&](int r) {
      return static_cast<int>(std::clamp<int64_t>(visible_keys(p, s, first_query + r) - key, 0, tile.count));
    };
    for (int r = 0; r < rows; ++r) {
      if (visible(r) > 0) {
        softmax_row(scratch.weights + r * kTileKeys, visible(r), padded_count, scratch.max[r], scratch.sum[r],
                    scratch.acc + r * padded_dim, padded_dim);
      }
    }

    const T* v = tile.v;
    const float* wide_v = scratch.v_wide;
    const bool whole = visible(0) == tile.count;  // the first query sees the fewest keys
    const auto weigh = [&](const auto* values, int64_t stride, int from, int to) {
      if (whole) {
        multiply<true>(rows, head_dim, to - from, scratch.weights + from, kTileKeys, values + from * stride, stride,
                       scratch.acc, padded_dim);
        return;
      }
      for (int r = 0; r < rows; ++r) {
        multiply<true>(1, head_dim, std::min(to, visible(r)) - from, scratch.weights + r * kTileKeys + from, kTileKeys,
                       values + from * stride, stride, scratch.acc + r * padded_dim, padded_dim);
      }
    };
    for (int j = 0; j < tile.count; j += kW) {
      const int stop = std::min(j + kW, tile.count);
      prefetch_step(p, ahead);
      if (direct) {
        weigh(v, p.v_token_stride, j, stop);
      } else if constexpr (!std::is_same_v<T, float>) {
        for (int i = j; i < stop; ++i) widen_row(v + i * p.v_token_stride, head_dim, scratch.v_wide + i * padded_dim);
      }
    }
    if (!direct) {
      if constexpr (std::is_same_v<T, float>) {
        weigh(v, p.v_token_stride, 0, tile.count);
      } else {
        weigh(wide_v, padded_dim, 0, tile.count);
      }
    }
    key += tile.count;
    tile = ahead[0];
    std::copy(ahead + 1, ahead + kAhead, ahead);
    ahead[kAhead - 1] = next_tile();
  }
}

// out = acc / sum, lse = max + log(sum) of one query and head.
template <typename T>
void finish_row(const AttentionParams& p, int64_t query, int64_t head, const float* acc, float max, float sum) {
  const int head_dim = static_cast<int>(p.head_dim);
  const Vec scale = Vec::set1(sum == 0.0f ? 0.0f : 1.0f / sum);
  T* out = static_cast<T*>(p.out) + (query * p.num_heads + head) * p.head_dim;
  for (int d = 0; d < head_dim; d += kW) {
    const int lanes = std::min(kW, head_dim - d);
    store_n(out + d, load_n(acc + d, lanes) * scale, lanes);
  }
  if (p.lse != nullptr) p.lse[head * p.total_q + query] = sum == 0.0f ? kMinusInf : max + std::log(sum);
}

template <typename T>
void run_item(const AttentionParams& p, const AttentionSequence& s, int64_t item, Scratch& scratch) {
  const int64_t block = item % s.num_blocks;
  const int64_t head = item / s.num_blocks % p.num_heads;
  const int64_t split = item / s.num_blocks / p.num_heads;
  const int64_t first_query = block * kAttentionQueryBlock;
  const int rows = static_cast<int>(std::min(kAttentionQueryBlock, s.num_queries - first_query));
  const int padded_dim = (static_cast<int>(p.head_dim) + kW - 1) / kW * kW;
  const bool is_split = s.num_splits > 1;
  const int64_t begin = is_split ? split * kAttentionSplitKeys : 0;
  const int64_t end = is_split ? std::min(begin + kAttentionSplitKeys, s.num_keys) : s.num_keys;
  attend<T>(p, s, head, first_query, rows, begin, end, scratch);
  for (int r = 0; r < rows; ++r) {
    const float* acc = scratch.acc + r * padded_dim;
    if (!is_split) {
      finish_row<T>(p, s.q_begin + first_query + r, head, acc, scratch.max[r], scratch.sum[r]);
      continue;
    }
    const int64_t partial_idx = s.first_partial + (head * s.num_queries + r) * s.num_splits + split;
    float* partial = p.partials + partial_idx * (p.head_dim + 2);
    std::copy_n(acc, p.head_dim, partial);
    partial[p.head_dim] = scratch.max[r];
    partial[p.head_dim + 1] = scratch.sum[r];
  }
}

// One query and head: its partial results are weighted to their common maximum and summed in the order of the keys.
template <typename T>
void combine_row(const AttentionParams& p, const AttentionSequence& s, int64_t head, int64_t query) {
  const int64_t stride = p.head_dim + 2;
  const float* partials = p.partials + (s.first_partial + (head * s.num_queries + query) * s.num_splits) * stride;
  float max = kMinusInf;
  for (int64_t i = 0; i < s.num_splits; ++i) max = std::max(max, partials[i * stride + p.head_dim]);
  const float shift = max == kMinusInf ? 0.0f : max;
  alignas(64) float acc[kMaxDim] = {};
  float sum = 0.0f;
  for (int64_t i = 0; i < s.num_splits; ++i) {
    const float* partial = partials + i * stride;
    const float weight = std::exp(partial[p.head_dim] - shift);
    sum += weight * partial[p.head_dim + 1];
    for (int64_t d = 0; d < p.head_dim; ++d) acc[d] += weight * partial[d];
  }
  finish_row<T>(p, s.q_begin + query, head, acc, max, sum);
}

}  // namespace

void attention(const AttentionParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = decltype(tag);
    Scratch scratch;
    const AttentionSequence* s = p.sequences;
    for (int64_t item = begin; item < end; ++item) {
      while (item >= s->first_item + p.num_heads * s->num_blocks * s->num_splits) ++s;
      run_item<T>(p, *s, item - s->first_item, scratch);
    }
  });
}

void attention_combine(const AttentionParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = decltype(tag);
    for (int64_t item = begin; item < end; ++item) {
      const AttentionSequence& s = p.sequences[item / p.num_heads];
      if (s.num_splits <= 1) continue;
      for (int64_t query = 0; query < s.num_queries; ++query) combine_row<T>(p, s, item % p.num_heads, query);
    }
  });
}

}  // namespace persimmon_fast::cpu::PF_ISA
