// attention: out[t, h] = sum_j softmax_j(softmax_scale q[t, h] . k[j, h]) v[j, h]     j: the keys that query t sees
//
// Work      one sequence, one head, up to 64 queries; key tiles of up to 64 keys (never across a page), online
//           softmax. Up to 16 queries: cut further into 2,048 keys, partial results merged by attention_combine
// Scores    bf16 on a processor with AMX, up to 16 queries: the tile unit, attention_amx.h. Else, up to 4 queries: one
//           register of keys at a time, a dot product each, summed by a register transpose; more: the tile of K is
//           transposed to fp32 once and multiplied as a matrix. Then P V as a matrix
// Traffic   decode: K and V once. One stream of misses does not fill the memory's bandwidth, and hardware
//           prefetchers stop at 4 KB: software prefetch walks K and V of the next four tiles in lockstep, eight
//           streams, and on into the next head. Splits are the outer loop over heads: the TLB and page-table lines of a
//           split's pages still serve the next head
// Bound     memory for up to 4 queries per sequence (16 on AMX: half of it), arithmetic for many
// Numerics  scores, softmax, weights and sums in fp32, rounded once. A key that a query does not see is left out, not
//           multiplied by zero: a NaN there cannot reach it. No keys: out 0, lse -inf. Up to 4 queries (16 on AMX) of a
//           sequence have the bits that each has alone
// Measured  share of the read bandwidth of the same run (33.8 GB/s, huge pages), 64 heads x 64, bf16, 2 threads, median
//           of 12 rounds: 1 query 0.83 at 2,048 and 0.86 at 16,384 keys, 4 queries 0.75, 16 queries 0.52; at 128 keys
//           0.5, 0.1 ms. Before AMX: 0.77, 0.81, 0.60, 0.27. 2,048 tokens, 16 heads, causal, 1 thread: 109 GFLOP/s
//           bf16, 103 fp16, 82 fp32. Sapphire-Rapids-class Xeon (fp32 peak at 2.6 GHz: 166), 2026-11
// Source    Dao et al. 2022, FlashAttention, arXiv:2205.14135; Milakov and Gimelshein 2018, Online normalizer
//           calculation for softmax, arXiv:1805.02867; splits as in Flash-Decoding (Dao et al. 2023)
#include "csrc/cpu/attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "csrc/cpu/attention_tiles.h"
#include "csrc/cpu/transpose.h"
#include "csrc/cpu/vec.h"
#if defined(__AVX512BF16__)
#include "csrc/cpu/attention_amx.h"
#endif

namespace persimmon_fast::cpu::PF_ISA {
namespace {

constexpr int kKeysPerStep = kW / (2 * kAhead);  // of the prefetch: two steps for every register of keys
static_assert(kKeysPerStep >= 1, "a step must make progress");
constexpr int kDirectRows = 4;  // up to here K and V are used as they lie; above, they are converted once per tile
// Matrix products keep 4 rows x kGroup registers of sums: 16 of 32 registers with AVX-512, 8 of 16 with AVX2.
constexpr int kGroup = kW == 16 ? 4 : 2;

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

// A block of queries of one head in vector registers, any type.
template <typename T>
class VectorAttention {
 public:
  VectorAttention(const AttentionParams& p, int num_queries, AttentionScratch& scratch)
      : p_(p),
        scratch_(scratch),
        num_queries_(num_queries),
        head_dim_(static_cast<int>(p.head_dim)),
        padded_dim_(padded_dim(p)),
        direct_(num_queries <= kDirectRows) {}

  int num_queries() const { return num_queries_; }

  void load_query(int row, const T* q) {
    for (int d = 0; d < head_dim_; d += kW) {
      const Vec wide = load_n(q + d, std::min(kW, head_dim_ - d));
      store(scratch_.q + row * padded_dim_ + d, wide * Vec::set1(p_.softmax_scale));
    }
  }

  template <typename Prefetch>
  void scores(const KeyTile<T>& tile, const Prefetch& prefetch) {
    for (int j = 0; j < tile.count; j += kW) {
      prefetch(kKeysPerStep);
      if (direct_) {
        for (int r = 0; r < num_queries_; ++r) {
          store(scratch_.weights + r * kTileKeys + j,
                dot_keys(scratch_.q + r * padded_dim_, tile.k + j * p_.k_token_stride, p_.k_token_stride,
                         tile.count - j, head_dim_));
        }
      } else {
        transpose_keys(tile.k, p_.k_token_stride, j, tile.count, head_dim_, scratch_.k_transposed);
      }
    }
    if (!direct_) {
      multiply<false>(num_queries_, padded(tile.count), head_dim_, scratch_.q, padded_dim_, scratch_.k_transposed,
                      kTileKeys, scratch_.weights, kTileKeys);
    }
  }

  template <typename Visible, typename Prefetch>
  void weigh(const KeyTile<T>& tile, const Visible& visible, const Prefetch& prefetch) {
    const bool whole = visible(0) == tile.count;  // the first query sees the fewest keys
    const auto weigh_keys = [&](const auto* values, int64_t stride, int from, int to) {
      if (whole) {
        multiply<true>(num_queries_, head_dim_, to - from, scratch_.weights + from, kTileKeys, values + from * stride,
                       stride, scratch_.acc, padded_dim_);
        return;
      }
      for (int r = 0; r < num_queries_; ++r) {
        multiply<true>(1, head_dim_, std::min(to, visible(r)) - from, scratch_.weights + r * kTileKeys + from,
                       kTileKeys, values + from * stride, stride, scratch_.acc + r * padded_dim_, padded_dim_);
      }
    };
    for (int j = 0; j < tile.count; j += kW) {
      const int stop = std::min(j + kW, tile.count);
      prefetch(kKeysPerStep);
      if (direct_) {
        weigh_keys(tile.v, p_.v_token_stride, j, stop);
      } else if constexpr (!std::is_same_v<T, float>) {
        for (int i = j; i < stop; ++i) {
          widen_row(tile.v + i * p_.v_token_stride, head_dim_, scratch_.v_wide + i * padded_dim_);
        }
      }
    }
    if (direct_) return;
    if constexpr (std::is_same_v<T, float>) {
      weigh_keys(tile.v, p_.v_token_stride, 0, tile.count);
    } else {
      weigh_keys(static_cast<const float*>(scratch_.v_wide), padded_dim_, 0, tile.count);
    }
  }

 private:
  const AttentionParams& p_;
  AttentionScratch& scratch_;
  int num_queries_;
  int head_dim_;
  int padded_dim_;
  bool direct_;
};

// Keys [begin, end) for the queries of one head from first_query on: leaves acc, max and sum in scratch. attention: a
// VectorAttention or a TileAttention.
template <typename T, typename Attention>
void attend(const AttentionParams& p, const AttentionSequence& s, int64_t head, int64_t first_query, int64_t begin,
            int64_t end, Attention& attention, AttentionScratch& scratch) {
  const int rows = attention.num_queries();
  for (int r = 0; r < rows; ++r) {
    const int64_t query = s.q_begin + first_query + r;
    attention.load_query(r, static_cast<const T*>(p.q) + query * p.q_token_stride + head * p.q_head_stride);
    std::fill_n(scratch.acc + r * padded_dim(p), padded_dim(p), 0.0f);
    scratch.max[r] = kMinusInf;
    scratch.sum[r] = 0.0f;
  }
  end = std::min(end, visible_keys(p, s, first_query + rows - 1));
  if (begin >= end) return;
  // Prefetch runs on into the next head, the next work item of most threads: short contexts have few tiles each.
  int64_t ahead_head = head;
  int64_t ahead_key = begin;
  const auto next_tile = [&] {
    if (ahead_key >= end && ahead_head == head) {
      ++ahead_head;
      ahead_key = begin;
    }
    if (ahead_key >= end || ahead_head == p.num_heads) return KeyTile<T>{};
    const KeyTile<T> next = key_tile<T>(p, s, ahead_head, ahead_key, end);
    ahead_key += next.count;
    return next;
  };
  KeyTile<T> tile = next_tile();
  KeyTile<T> ahead[kAhead];
  for (KeyTile<T>& next : ahead) next = next_tile();
  const auto prefetch = [&](int num_keys) { prefetch_keys(p, ahead, num_keys); };
  for (int64_t key = begin; key < end;) {
    const auto visible = [&](int r) {
      return static_cast<int>(std::clamp<int64_t>(visible_keys(p, s, first_query + r) - key, 0, tile.count));
    };
    attention.scores(tile, prefetch);
    for (int r = 0; r < rows; ++r) {
      if (visible(r) > 0) {
        softmax_row(scratch.weights + r * kTileKeys, visible(r), padded(tile.count), scratch.max[r], scratch.sum[r],
                    scratch.acc + r * padded_dim(p), padded_dim(p));
      }
    }
    attention.weigh(tile, visible, prefetch);
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

// Calls body with what computes a block of `rows` queries.
template <typename T, typename Body>
void with_attention(const AttentionParams& p, int rows, AttentionScratch& scratch, const Body& body) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, bf16>) {
    if (amx::can_attend(p, rows)) {
      amx::TileAttention attention(p, rows, scratch);
      return body(attention);
    }
  }
#endif
  VectorAttention<T> attention(p, rows, scratch);
  body(attention);
}

template <typename T>
void run_item(const AttentionParams& p, const AttentionSequence& s, int64_t item, AttentionScratch& scratch) {
  const int64_t block = item % s.num_blocks;
  const int64_t head = item / s.num_blocks % p.num_heads;
  const int64_t split = item / s.num_blocks / p.num_heads;
  const int64_t first_query = block * kAttentionQueryBlock;
  const int rows = static_cast<int>(std::min(kAttentionQueryBlock, s.num_queries - first_query));
  const bool is_split = s.num_splits > 1;
  const int64_t begin = is_split ? split * kAttentionSplitKeys : 0;
  const int64_t end = is_split ? std::min(begin + kAttentionSplitKeys, s.num_keys) : s.num_keys;
  with_attention<T>(p, rows, scratch,
                    [&](auto& attention) { attend<T>(p, s, head, first_query, begin, end, attention, scratch); });
  for (int r = 0; r < rows; ++r) {
    const float* acc = scratch.acc + r * padded_dim(p);
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
    AttentionScratch scratch;
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
