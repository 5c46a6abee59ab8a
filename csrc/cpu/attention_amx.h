// Attention of up to 16 queries on the AMX tile unit, bf16. For attention.cpp, where the access pattern is described.
//
//   scores^T [16 keys][queries] = K [16 keys][dims] x Q^T            K as it lies in memory, 32 dims at a time
//   acc [queries][16 dims]     += P [queries][32 keys] x V           V as pairs of keys: [16 pairs][16 dims][2]
//
// Numerics  products of bf16 numbers are exact, sums fp32. The weights P stay fp32 numbers in effect: each is the sum
// of
//           two bf16 numbers, 16 bits of it, and both parts are multiplied. A query's result does not depend on the
//           others: rows of P and columns of Q^T do not see one another. A key that a query does not see has weight 0;
//           where its V holds NaN or inf, which 0 does not silence, every query gets a V of its own without it
// Measured  a tile of 64 keys x 64 dims in L2: 0.5 us for one query, 0.8 for 4, 2.1 for 16 (softmax goes row by row).
//           Its 16 KB take 1.0 us to arrive at a core's share of the bandwidth. Sapphire-Rapids-class Xeon, 2026-11
#pragma once

#include <immintrin.h>

#include <cstring>

#include "csrc/cpu/amx.h"
#include "csrc/cpu/attention_tiles.h"
#include "csrc/cpu/transpose.h"

namespace persimmon_fast::cpu::PF_ISA {
namespace amx {

constexpr int kMaxQueries = 16;
constexpr int kTileDims = 32;  // of K and Q^T in one product
constexpr int kPairs = kTileKeys / 2;

inline bool can_attend(const AttentionParams& p, int num_queries) {
  return active_isa() == Isa::kAmx && p.dtype == DType::kBFloat16 && num_queries <= kMaxQueries &&
         p.head_dim % kTileDims == 0;
}

// One block of queries of one head; the tiles' configuration lasts as long as it does.
class TileAttention {
 public:
  TileAttention(const AttentionParams& p, int num_queries, AttentionScratch& scratch)
      : p_(p), scratch_(scratch), num_queries_(num_queries), head_dim_(static_cast<int>(p.head_dim)) {
    const int query_bytes = num_queries * static_cast<int>(sizeof(float));
    TileConfig config;
    config.set(kAcc0, num_queries, 64);
    config.set(kAcc1, num_queries, 64);
    config.set(kHigh, num_queries, 64);
    config.set(kLow, num_queries, 64);
    config.set(kKeys, 16, 64);
    config.set(kQueries, 16, query_bytes);
    config.set(kScores, 16, query_bytes);
    configure(config);
  }
  ~TileAttention() { release(); }
  TileAttention(const TileAttention&) = delete;
  TileAttention& operator=(const TileAttention&) = delete;

  int num_queries() const { return num_queries_; }

  // Query `row` of the block, as Q^T lies: [dims / 2][queries][2].
  void load_query(int row, const bf16* q) {
    for (int d = 0; d < head_dim_; d += 2) std::memcpy(queries_ + (d / 2 * num_queries_ + row) * 2, q + d, 4);
  }

  // scratch.weights[row][key] = softmax_scale q . k for the tile's keys, more than those up to a multiple of 16.
  template <typename Prefetch>
  void scores(const KeyTile<bf16>& tile, const Prefetch& prefetch) {
    const Vec scale = Vec::set1(p_.softmax_scale);
    for (int key = 0; key < tile.count; key += 16) {
      prefetch(1);
      const bf16* k = tile.k + key * p_.k_token_stride;
      int64_t stride = p_.k_token_stride;
      if (tile.count - key < 16) {  // rows past the end may lie outside the tensor
        std::memset(edge_keys_, 0, sizeof(edge_keys_));
        for (int i = 0; i < tile.count - key; ++i) {
          std::memcpy(edge_keys_ + i * head_dim_, k + i * stride, head_dim_ * sizeof(bf16));
        }
        k = edge_keys_;
        stride = head_dim_;
      }
      zero<kScores>();
      for (int d = 0; d < head_dim_; d += kTileDims) {
        load<kKeys>(k + d, stride * static_cast<int64_t>(sizeof(bf16)));
        load<kQueries>(queries_ + d * num_queries_, num_queries_ * static_cast<int64_t>(sizeof(float)));
        multiply_add<kScores, kKeys, kQueries>();
      }
      // [key][query] of the tile, to [query][key]
      store<kScores>(scores_, num_queries_ == 1 ? 4 : 64);
      float* out = scratch_.weights + key;
      if (num_queries_ == 1) {
        PF_ISA::store(out, PF_ISA::load(scores_) * scale);
        continue;
      }
      Vec block[16];
      for (int i = 0; i < 16; ++i) block[i] = PF_ISA::load(scores_ + i * 16);
      transpose(block);
      for (int row = 0; row < num_queries_; ++row) PF_ISA::store(out + row * kTileKeys, block[row] * scale);
    }
  }

  // scratch.acc[row] += sum_key weights[row][key] v[key] over the keys that row sees, the first visible(row) ones.
  template <typename Visible, typename Prefetch>
  void weigh(const KeyTile<bf16>& tile, const Visible& visible, const Prefetch& prefetch) {
    const bool finite = pair_values(tile, tile.count, visible(0), prefetch);
    split_weights(tile.count, visible);
    if (finite) {
      multiply_values(0, num_queries_, tile.count, prefetch);
      return;
    }
    // The configured tiles have num_queries_ rows: each query is multiplied alone, the others with weights 0.
    for (int row = 0; row < num_queries_; ++row) {
      pair_values(tile, visible(row), visible(row), [](int) {});
      multiply_values(row, row + 1, tile.count, [](int) {});
    }
  }

 private:
  static constexpr int kAcc0 = 0, kAcc1 = 1, kHigh = 2, kLow = 3, kKeys = 4, kQueries = 5, kScores = 6;

  // values_[pair][dim][2] of the first `count` keys, zeros after them. Whether keys from `seen` on are finite.
  template <typename Prefetch>
  bool pair_values(const KeyTile<bf16>& tile, int count, int seen, const Prefetch& prefetch) {
    alignas(64) static constexpr uint16_t kFirst[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                        8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i first = _mm512_load_si512(kFirst);
    const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    const __m512i exponent = _mm512_set1_epi16(0x7f80);
    __mmask32 not_finite = 0;
    for (int key = 0; key < tile.count; key += 2) {
      if (key % 8 == 0) prefetch(1);
      const bf16* v = tile.v + key * p_.v_token_stride;
      bf16* out = values_ + key * head_dim_;
      for (int d = 0; d < head_dim_; d += 32, out += 64) {
        const __m512i even = key < count ? _mm512_loadu_si512(v + d) : _mm512_setzero_si512();
        const __m512i odd = key + 1 < count ? _mm512_loadu_si512(v + p_.v_token_stride + d) : _mm512_setzero_si512();
        if (key + 1 >= seen) {
          not_finite |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(odd, exponent), exponent);
          if (key >= seen) not_finite |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(even, exponent), exponent);
        }
        _mm512_store_si512(out, _mm512_permutex2var_epi16(even, first, odd));
        _mm512_store_si512(out + 32, _mm512_permutex2var_epi16(even, second, odd));
      }
    }
    const int padded = (tile.count + 31) / 32 * 32;
    const int written = (tile.count + 1) / 2 * 2;
    std::memset(values_ + written * head_dim_, 0, (padded - written) * head_dim_ * sizeof(bf16));
    return not_finite == 0;
  }

  // weights_[part][row][key]: bf16(w), then bf16(w - bf16(w)).
  template <typename Visible>
  void split_weights(int count, const Visible& visible) {
    for (int row = 0; row < num_queries_; ++row) {
      const float* weights = scratch_.weights + row * kTileKeys;
      const int num_seen = visible(row);
      for (int key = 0; key < (count + 31) / 32 * 32; key += 16) {
        const Vec weight = key < num_seen ? PF_ISA::load(weights + key) : Vec::zero();
        bf16* high = weights_[0] + row * kTileKeys + key;
        PF_ISA::store(high, weight);
        PF_ISA::store(weights_[1] + row * kTileKeys + key, weight - PF_ISA::load(high));
      }
    }
  }

  // Rows [begin, end) of acc; the others keep their bits.
  template <typename Prefetch>
  void multiply_values(int begin, int end, int count, const Prefetch& prefetch) {
    const int64_t acc_stride = head_dim_ * static_cast<int64_t>(sizeof(float));
    const int64_t value_stride = head_dim_ * 2 * static_cast<int64_t>(sizeof(bf16));
    const bool all = begin == 0 && end == num_queries_;
    float* acc = all ? scratch_.acc : one_acc_;
    if (!all) std::memcpy(acc + begin * head_dim_, scratch_.acc + begin * head_dim_, acc_stride);
    for (int d = 0; d < head_dim_; d += 32) {
      load<kAcc0>(acc + d, acc_stride);
      load<kAcc1>(acc + d + 16, acc_stride);
      for (int key = 0; key < count; key += 32) {
        prefetch(1);
        load<kHigh>(weights_[0] + key, kTileKeys * static_cast<int64_t>(sizeof(bf16)));
        load<kLow>(weights_[1] + key, kTileKeys * static_cast<int64_t>(sizeof(bf16)));
        const bf16* values = values_ + key * head_dim_ + d * 2;
        load<kKeys>(values, value_stride);
        multiply_add<kAcc0, kHigh, kKeys>();
        multiply_add<kAcc0, kLow, kKeys>();
        load<kKeys>(values + 32, value_stride);
        multiply_add<kAcc1, kHigh, kKeys>();
        multiply_add<kAcc1, kLow, kKeys>();
      }
      store<kAcc0>(acc + d, acc_stride);
      store<kAcc1>(acc + d + 16, acc_stride);
    }
    if (!all) std::memcpy(scratch_.acc + begin * head_dim_, acc + begin * head_dim_, acc_stride);
  }

  const AttentionParams& p_;
  AttentionScratch& scratch_;
  int num_queries_;
  int head_dim_;
  alignas(64) bf16 queries_[kMaxDim * kMaxQueries];
  alignas(64) bf16 edge_keys_[16 * kMaxDim];
  alignas(64) float scores_[16 * 16];
  alignas(64) bf16 values_[kTileKeys * kMaxDim];
  alignas(64) bf16 weights_[2][kMaxQueries * kTileKeys];
  alignas(64) float one_acc_[kMaxQueries * kMaxDim];
};

}  // namespace amx
}  // namespace persimmon_fast::cpu::PF_ISA
