// flash_attention_sm90.cu: the warps that fill shared memory.
#pragma once

#include "csrc/cuda/flash_attention_sm90.cuh"

namespace persimmon_fast::cuda::flash_sm90 {

// The warps that fill shared memory: one the queries, one the ring of keys, one that of values.
template <int kHeadDim>
struct Loader {
  using S = Shape<kHeadDim>;
  const Params& params;
  const Smem<kHeadDim>& smem;
  const int lane;

  DEV void load_queries() const {
    if (lane != 0) return;
    unsigned parities = 0;  // a bit for each warpgroup
    for_rounds(params, [&](unsigned round) {
      const Item<kHeadDim> item(params, round);
#pragma unroll 1
      for (int group = 0; group < S::kGroups; ++group) {
        if (item.num_key_tiles(params.attention, group) == 0) continue;
        ptx::mbarrier_wait(smem.q_empty(group), (parities >> group & 1u) ^ 1u);
        parities ^= 1u << group;
        ptx::mbarrier_arrive_expect_tx(smem.q_full(group), S::kQueryBytes);
        const int row = static_cast<int>(item.s.q_begin) + item.first_query(group);
#pragma unroll
        for (int box = 0; box < S::kBoxes; ++box) {
          ptx::tma_load(smem.q_tile(group) + box * kGroupRows * kRowBytes, &params.q, smem.q_full(group),
                        {box * 64, item.head_idx, row});
        }
      }
    });
  }

  DEV void load_keys() const {
    for_tiles([&](const Item<kHeadDim>& item, int key_begin, const RingPosition& at) {
      load_rows(params.k, smem.k_tile(at.stage), smem.k_full(at.stage), smem.k_empty(at.stage), at.parity, item,
                key_begin);
    });
  }

  // A masked weight is 0, but 0 * NaN is NaN: rows behind the sequence's end, which may be anything, become zeros.
  DEV void load_values(unsigned char* s_values) const {
    int end_parity = 0;
    for_tiles([&](const Item<kHeadDim>& item, int key_begin, const RingPosition& at) {
      const bool is_end = key_begin + kBlockN > item.s.num_keys;
      load_rows(params.v, smem.v_tile(at.stage), is_end ? smem.v_end() : smem.v_full(at.stage), smem.v_empty(at.stage),
                at.parity, item, key_begin);
      if (!is_end) return;
      ptx::mbarrier_wait(smem.v_end(), end_parity);
      end_parity ^= 1;
      unsigned char* s_tile = s_values + at.stage * S::kTileBytes;
      for (int offset = (item.s.num_keys - key_begin) * kRowBytes + lane * 16; offset < kBlockN * kRowBytes;
           offset += kWarpSize * 16) {
#pragma unroll
        for (int box = 0; box < S::kBoxes; ++box) {
          *reinterpret_cast<uint4*>(s_tile + box * kBlockN * kRowBytes + offset) = make_uint4(0, 0, 0, 0);
        }
      }
      ptx::fence_proxy_async();
      __syncwarp();
      if (lane == 0) ptx::mbarrier_arrive(smem.v_full(at.stage));
    });
  }

 private:
  // body(item, key_begin, at) for every tile of keys.
  template <typename Body>
  DEV void for_tiles(Body body) const {
    RingPosition at;
    for_rounds(params, [&](unsigned round) {
      const Item<kHeadDim> item(params, round);
      const int num_tiles = item.num_key_tiles(params.attention, 0);
#pragma unroll 1
      for (int tile = 0; tile < num_tiles; ++tile, at.advance()) body(item, tile * kBlockN, at);
    });
  }

  // Once nobody reads the tile at s_tile any more: key_begin .. key_begin + kBlockN of keys or values. A lane a copy.
  DEV void load_rows(const CUtensorMap& map, uint32_t s_tile, uint32_t full, uint32_t empty, int parity,
                     const Item<kHeadDim>& item, int key_begin) const {
    if (lane == 0) {
      ptx::mbarrier_wait(empty, parity ^ 1);
      ptx::mbarrier_arrive_expect_tx(full, S::kTileBytes);
    }
    __syncwarp();
    const AttentionParams& p = params.attention;
    const int dim = lane % S::kBoxes * 64;
    const int row = lane / S::kBoxes * params.box_rows;
    if (row >= kBlockN) return;
    const uint32_t s_box = s_tile + (lane % S::kBoxes * kBlockN + row) * kRowBytes;
    const int key_idx = key_begin + row;
    if (p.page_table == nullptr) {
      ptx::tma_load(s_box, &map, full, {dim, item.head_idx, static_cast<int>(item.s.k_begin) + key_idx});
    } else {
      // Behind the keys the table means nothing: a page outside the cache arrives as zeros.
      const int32_t* pages = p.page_table + item.sequence_idx * p.page_table_stride;
      const int page = key_idx < item.s.num_keys ? pages[key_idx >> params.page_shift] : static_cast<int>(p.total_k);
      ptx::tma_load(s_box, &map, full, {dim, key_idx & (p.page_size - 1), item.head_idx, page});
    }
  }
};

}  // namespace persimmon_fast::cuda::flash_sm90
