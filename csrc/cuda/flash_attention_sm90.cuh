// flash_attention_sm90.cu: shapes, shared memory, and the items that a block works on.
#pragma once

#include "csrc/cuda/attention.cuh"
#include "csrc/cuda/launch_sm90.cuh"
#include "csrc/cuda/ptx_sm90.cuh"
#include "csrc/cuda/ring_sm90.cuh"

namespace persimmon_fast::cuda::flash_sm90 {

constexpr int kGroupRows = 64;  // queries of a warpgroup: the m of wgmma
constexpr int kBlockN = 128;    // keys of a tile
constexpr int kStages = 3;
constexpr int kGroupThreads = 128;
constexpr int kGroupWarps = 4;
constexpr int kRowBytes = 128;  // of a box: 64 elements, the width of the swizzle

template <int kHeadDim>
struct Shape {
  static constexpr int kGroups = kHeadDim == 64 ? 3 : 2;  // warpgroups that multiply
  static constexpr int kBlockM = kGroups * kGroupRows;
  static constexpr int kThreads = (kGroups + 1) * kGroupThreads;
  static constexpr int kLoadRegisters = kHeadDim == 64 ? 32 : 40;
  static constexpr int kMultiplyRegisters = kHeadDim == 64 ? 160 : 232;
  static constexpr int kBoxes = kHeadDim / 64;  // that lie beside each other
  static constexpr int kQueryBytes = kGroupRows * kHeadDim * 2;
  static constexpr int kTileBytes = kBlockN * kHeadDim * 2;
  static constexpr int kBarriers = 4 * kStages + 2 * kGroups + 1;
  static constexpr size_t kSmemBytes = kGroups * kQueryBytes + 2 * kStages * kTileBytes + kBarriers * 8;
  static_assert(kSmemBytes <= kMaxSmemBytesSm90);
};

struct Params {
  CUtensorMap q;
  CUtensorMap k;
  CUtensorMap v;
  AttentionParams attention;
  unsigned num_rounds;  // in which every block does an item
  int box_rows;         // keys that one copy brings
  int page_shift;       // log2 of the page size
  float scale_log2;
  float slack;  // maximum_slack
};

// Addresses in shared memory.
template <int kHeadDim>
struct Smem {
  using S = Shape<kHeadDim>;
  uint32_t q;  // [kGroups]: a box of 64 queries for each 64 dims
  uint32_t k;  // [kStages]: a box of kBlockN keys for each 64 dims
  uint32_t v;
  uint32_t barriers;

  // Barriers of stages: the tile has arrived, nobody reads it any more. Of warpgroups: their queries.
  DEV uint32_t k_full(int stage) const { return barriers + 8 * stage; }
  DEV uint32_t k_empty(int stage) const { return barriers + 8 * (kStages + stage); }
  DEV uint32_t v_full(int stage) const { return barriers + 8 * (2 * kStages + stage); }
  DEV uint32_t v_empty(int stage) const { return barriers + 8 * (3 * kStages + stage); }
  DEV uint32_t q_full(int group) const { return barriers + 8 * (4 * kStages + group); }
  DEV uint32_t q_empty(int group) const { return barriers + 8 * (4 * kStages + S::kGroups + group); }
  DEV uint32_t v_end() const { return barriers + 8 * (4 * kStages + 2 * S::kGroups); }
  DEV uint32_t q_tile(int group) const { return q + group * S::kQueryBytes; }
  DEV uint32_t k_tile(int stage) const { return k + stage * S::kTileBytes; }
  DEV uint32_t v_tile(int stage) const { return v + stage * S::kTileBytes; }

  DEV void init_barriers() const {
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::mbarrier_init(k_full(stage), 1);
      ptx::mbarrier_init(v_full(stage), 1);
      ptx::mbarrier_init(k_empty(stage), S::kGroups * kGroupWarps);
      ptx::mbarrier_init(v_empty(stage), S::kGroups * kGroupWarps);
    }
    for (int group = 0; group < S::kGroups; ++group) {
      ptx::mbarrier_init(q_full(group), 1);
      ptx::mbarrier_init(q_empty(group), kGroupWarps);
    }
    ptx::mbarrier_init(v_end(), 1);
    ptx::fence_mbarrier_init();
  }
};

// From item to item.
using RingPosition = cuda::RingPosition<kStages>;

// The item of this block in a round. Heaviest first: with a causal mask the last tiles of every head and sequence have
// the most keys. Every other round goes backwards, so that no block always gets the heavier ones.
DEV unsigned item_of_round(unsigned round) {
  return round * gridDim.x + (round % 2 == 0 ? blockIdx.x : gridDim.x - 1 - blockIdx.x);
}

// A tile of queries of one head and sequence. Tiles are cut from a sequence's end, so that the heaviest are whole;
// warpgroup 0 has the last queries of a tile, which see the most keys.
template <int kHeadDim>
struct Item {
  using S = Shape<kHeadDim>;
  int head_idx;
  int sequence_idx;
  int q_end;  // of the sequence's queries; not positive: there is no such tile
  Sequence s;

  DEV Item(const Params& params, unsigned round) {
    const unsigned item_idx = item_of_round(round);
    const AttentionParams& p = params.attention;
    const unsigned num_pairs = static_cast<unsigned>(p.num_heads) * static_cast<unsigned>(p.batch_size);
    const unsigned pair_idx = item_idx % num_pairs;
    head_idx = static_cast<int>(pair_idx % p.num_heads);
    sequence_idx = static_cast<int>(pair_idx / p.num_heads);
    s = load_sequence(p, sequence_idx);
    q_end = s.num_queries - static_cast<int>(item_idx / num_pairs) * S::kBlockM;
  }
  DEV int num_groups() const { return max(0, min(S::kGroups, ceil_div(q_end, kGroupRows))); }  // with queries
  // Of a warpgroup; negative numbers are no queries.
  DEV int first_query(int group) const { return q_end - (group + 1) * kGroupRows; }
  // Tiles of keys that some query of a warpgroup sees.
  DEV int num_key_tiles(const AttentionParams& p, int group) const {
    const int group_end = q_end - group * kGroupRows;
    const int keys = group_end > 0 ? num_visible_keys(p, s, group_end - 1) : 0;
    return keys > 0 ? ceil_div(keys, kBlockN) : 0;
  }
};

// body(round) for every round. What is left over of the last round are tiles before a sequence's first query.
template <typename Body>
DEV void for_rounds(const Params& params, Body body) {
#pragma unroll 1
  for (unsigned round = 0; round < params.num_rounds; ++round) body(round);
}

}  // namespace persimmon_fast::cuda::flash_sm90
