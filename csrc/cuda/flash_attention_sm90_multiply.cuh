// flash_attention_sm90.cu: the warpgroups that multiply.
#pragma once

#include "csrc/cuda/flash_attention_sm90.cuh"
#include "csrc/cuda/wgmma.cuh"

namespace persimmon_fast::cuda::flash_sm90 {

// Whose turn it is to issue products: a token that goes round the warpgroups with queries, by barriers 1 .. kGroups.
// While the products of one run, the others do their softmax.
struct Turn {
  const int group;
  bool here;  // the token waits at no barrier

  DEV explicit Turn(int group_idx) : group(group_idx), here(group_idx == 0) {}
  DEV void take() {
    if (!here) ptx::barrier_sync(1 + group, 2 * kGroupThreads);
  }
  DEV void pass(int num_groups) {
    ptx::barrier_arrive(1 + (group + 1 == num_groups ? 0 : group + 1), 2 * kGroupThreads);
    here = false;
  }
};

// In the four lanes of a row: what lane i holds in [j] goes to lane j's [i].
DEV void transpose_quad(uint32_t (&r)[4], int lane) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool upper = (lane & bit) != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((i & bit) != 0) continue;
      const uint32_t received = __shfl_xor_sync(kFullMask, upper ? r[i] : r[i | bit], bit);
      (upper ? r[i] : r[i | bit]) = received;
    }
  }
}

// A warpgroup: 64 queries, 16 per warp. Row 8 h + lane / 4 of a warp's is slot h.
template <typename scalar_t, int kHeadDim>
struct Multiplier {
  using S = Shape<kHeadDim>;
  const Params& params;
  const Smem<kHeadDim> smem;
  const int group;
  const int lane;
  Turn turn;
  RingPosition at;  // of the values that are multiplied next
  int q_parity = 0;

  float maximum[2];      // bare dot products
  float denominator[2];  // of this lane's columns
  float correction[2];   // factors of what was added up before the last softmax
  float scores[kBlockN / 2];
  uint32_t weights[kBlockN / 16][4];
  float acc[kHeadDim / 2];

  DEV Multiplier(const Params& launch_params, const Smem<kHeadDim>& s_memory, int group_idx)
      : params(launch_params), smem(s_memory), group(group_idx), lane(threadIdx.x % kWarpSize), turn(group_idx) {}

  DEV void release(uint32_t barrier) const {
    if (lane == 0) ptx::mbarrier_arrive(barrier);
  }

  // Before products: what was written to their registers is written.
  DEV void fence() {
    ptx::wgmma_registers(weights);
    ptx::wgmma_registers(acc);
    ptx::wgmma_fence();
  }
  // scores = q k^T, in flight.
  DEV void multiply_keys(int stage) {
    const uint64_t q = ptx::wgmma_operand(smem.q_tile(group));
    const uint64_t k = ptx::wgmma_operand(smem.k_tile(stage));
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
      const int box = step / 4;
      const int offset = step % 4 * 32;
      ptx::wgmma_ss<0>(scores, ptx::wgmma_operand_at(q, box * kGroupRows * kRowBytes + offset),
                       ptx::wgmma_operand_at(k, box * kBlockN * kRowBytes + offset), step > 0, scalar_t());
    }
    ptx::wgmma_commit();
  }
  // Once they have been waited for.
  DEV void keys_are_used(int stage, bool last) {
    ptx::wgmma_registers(scores);
    release(smem.k_empty(stage));
    if (last) release(smem.q_empty(group));
  }
  // acc += weights v, in flight.
  DEV void multiply_values(int stage) {
    const uint64_t v = ptx::wgmma_operand(smem.v_tile(stage), kBlockN * kRowBytes);
#pragma unroll
    for (int step = 0; step < kBlockN / 16; ++step) {
      ptx::wgmma_rs<1>(acc, weights[step], ptx::wgmma_operand_at(v, step * 16 * kRowBytes), true, scalar_t());
    }
    ptx::wgmma_commit();
  }
  DEV void values_are_used(int stage) {
    ptx::wgmma_registers(acc);
    ptx::wgmma_registers(weights);
    release(smem.v_empty(stage));
    at.advance();
  }

  // Scores of columns from num_visible[slot] on do not count. Slot 1 sees no less than slot 0.
  DEV void mask(const int (&num_visible)[2]) {
    if (!__any_sync(kFullMask, num_visible[0] < kBlockN)) return;
#pragma unroll
    for (int i = 0; i < kBlockN / 2; ++i) {
      if (i / 4 * 8 + i % 2 >= num_visible[i / 2 % 2]) scores[i] = -INFINITY;
    }
  }
  DEV void softmax() {
    auto& tiles = reinterpret_cast<float (&)[kBlockN / 8][4]>(scores);
#pragma unroll
    for (int slot = 0; slot < 2; ++slot) {
      correction[slot] =
          softmax_row(tiles, slot * 2, maximum[slot], denominator[slot], params.scale_log2, params.slack);
    }
  }
  // The layout of two groups of 8 columns of an accumulator is that of an A fragment.
  DEV void round_weights() {
#pragma unroll
    for (int i = 0; i < kBlockN / 4; ++i) {
      weights[i / 4][i % 4] = pack2(scores[2 * i], scores[2 * i + 1], scalar_t());
    }
  }
  DEV void rescale_sums() {
    if (!__any_sync(kFullMask, correction[0] != 1.0f || correction[1] != 1.0f)) return;  // a factor of 1 changes no bit
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) acc[i] *= correction[i / 2 % 2];
  }

  // The first query of the warp.
  DEV int warp_row(const Item<kHeadDim>& item) const {
    return item.first_query(group) + static_cast<int>(threadIdx.x) / kWarpSize % kGroupWarps * 16;
  }

  // The tiles of keys that the warpgroup sees: scores of one tile and sums of the one before are in flight together,
  // and the sums still run while those scores become weights.
  DEV void attend(unsigned round, int& num_tiles) {
    int num_groups, ordered_tiles;  // those in which every warpgroup multiplies
    int num_visible[2];             // from the next tile on, of the columns from this lane's first
    {
      const Item<kHeadDim> item(params, round);
      const AttentionParams& p = params.attention;
      num_groups = item.num_groups();
      num_tiles = item.num_key_tiles(p, group);
      ordered_tiles = num_groups > 1 ? item.num_key_tiles(p, num_groups - 1) : 0;
      const int row = warp_row(item);
#pragma unroll
      for (int slot = 0; slot < 2; ++slot) {
        num_visible[slot] = num_visible_keys(p, item.s, row + slot * 8 + lane / 4) - lane % 4 * 2;
        maximum[slot] = -INFINITY;
        denominator[slot] = 0.0f;
      }
    }
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) acc[i] = 0.0f;
    if (num_tiles == 0) return;

    ptx::mbarrier_wait(smem.q_full(group), q_parity);
    q_parity ^= 1;
    int v_stage = uniform(at.stage);
    ptx::mbarrier_wait(smem.k_full(v_stage), at.parity);
    if (ordered_tiles > 0) turn.take();
    fence();
    multiply_keys(v_stage);
    if (ordered_tiles > 0) turn.pass(num_groups);
    ptx::wgmma_wait<0>();
    keys_are_used(v_stage, num_tiles == 1);
    mask(num_visible);
    softmax();
    round_weights();
#pragma unroll 1
    for (int tile = 1; tile < num_tiles; ++tile) {
      RingPosition k_at = at;
      k_at.advance();
      const int k_stage = uniform(k_at.stage);
      v_stage = uniform(at.stage);
      ptx::mbarrier_wait(smem.k_full(k_stage), k_at.parity);
      ptx::mbarrier_wait(smem.v_full(v_stage), at.parity);
      if (tile < ordered_tiles) turn.take();
      fence();
      multiply_keys(k_stage);
      multiply_values(v_stage);
      if (tile < ordered_tiles) turn.pass(num_groups);
      ptx::wgmma_wait<1>();
      keys_are_used(k_stage, tile + 1 == num_tiles);
      num_visible[0] -= kBlockN;
      num_visible[1] -= kBlockN;
      mask(num_visible);
      softmax();
      ptx::wgmma_wait<0>();
      values_are_used(v_stage);
      rescale_sums();
      round_weights();
    }
    v_stage = uniform(at.stage);
    ptx::mbarrier_wait(smem.v_full(v_stage), at.parity);
    fence();
    multiply_values(v_stage);
    ptx::wgmma_wait<0>();
    values_are_used(v_stage);
  }

  // Tiles that only warpgroups with later queries see.
  DEV void skip_tiles(int count) {
#pragma unroll 1
    for (int tile = 0; tile < count; ++tile) {
      ptx::mbarrier_wait(smem.k_full(at.stage), at.parity);
      release(smem.k_empty(at.stage));
      ptx::mbarrier_wait(smem.v_full(at.stage), at.parity);
      release(smem.v_empty(at.stage));
      at.advance();
    }
  }

  DEV void store(const Item<kHeadDim>& item);

  DEV void run(unsigned round) {
    int num_tiles = 0;
    attend(round, num_tiles);
    const Item<kHeadDim> item(params, round);  // again: nothing of it takes registers above
    store(item);
    skip_tiles(item.num_key_tiles(params.attention, 0) - num_tiles);
  }
};

template <typename scalar_t, int kHeadDim>
DEV void Multiplier<scalar_t, kHeadDim>::store(const Item<kHeadDim>& item) {
  const AttentionParams& p = params.attention;
  const int warp_row = this->warp_row(item);
  unsigned again[2];  // a bit for each lane
#pragma unroll
  for (int slot = 0; slot < 2; ++slot) {
    const int row = warp_row + slot * 8 + lane / 4;
    float probe = 0.0f;
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
      probe = fmaf(acc[n * 4 + slot * 2], 0.0f, probe);
      probe = fmaf(acc[n * 4 + slot * 2 + 1], 0.0f, probe);
    }
    const float sum = quad_sum(denominator[slot]);
    const bool in_range = row >= 0;
    again[slot] = __ballot_sync(kFullMask, p.causal && in_range && probe != 0.0f);
    if (in_range && p.lse != nullptr && lane % 4 == 0) {
      p.lse[item.head_idx * p.total_q + item.s.q_begin + row] = softmax_lse(p, maximum[slot], sum);
    }
    const float factor = reciprocal(sum);
    scalar_t* g_out = out_row<scalar_t, kHeadDim>(p, item.s, item.head_idx, row);
    const bool writes = in_range && (again[slot] >> (lane / 4 * 4) & 0xfu) == 0;
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; n += 4) {
      uint32_t piece[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* pair = acc + (n + i) * 4 + slot * 2;
        piece[i] = pack2(pair[0] * factor, pair[1] * factor, scalar_t());
      }
      transpose_quad(piece, lane);
      if (writes) {
        *reinterpret_cast<uint4*>(g_out + (n + lane % 4) * 8) = make_uint4(piece[0], piece[1], piece[2], piece[3]);
      }
    }
  }
  if ((again[0] | again[1]) == 0) return;
  const Rows<scalar_t> k = key_rows<scalar_t>(p, item.s, item.sequence_idx, item.head_idx);
  const Rows<scalar_t> v = value_rows<scalar_t>(p, item.s, item.sequence_idx, item.head_idx);
#pragma unroll
  for (int slot = 0; slot < 2; ++slot) {
    repeat_rows<scalar_t, kHeadDim>(p, item.s, item.head_idx, warp_row + slot * 8, again[slot], k, v);
  }
}

}  // namespace persimmon_fast::cuda::flash_sm90
