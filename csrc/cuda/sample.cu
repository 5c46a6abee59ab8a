// sample: argmax over the kept tokens of z - log(E), E exponential numbers of Philox (reference.lm_head_sample)
//
// z = penalised logit / temperature. Every filter is a threshold on z, so a tile of 128 tokens whose maximum is below
// it is skipped. Kernels, in order; the host reads no parameter, so rows that do not need one leave it at once:
//
//   prepare   block = 1 row      merges the tiles, penalises in place, top-k and min-p thresholds
//   mass 0-2  block = 32 tiles   top-p, level by level of a histogram of probability (sample_nucleus.cuh)
//   draw      block = 32 tiles   Gumbel-max; a warp takes a tile, a lane 4 tokens and their one Philox block
//   finish    block = 1 row      best of the blocks, its log-probability
//
// Top-k     the k-th largest tile maximum is a lower bound of the k-th largest z: radix select, 8 bits a pass, over the
//           maxima, then over the tokens above that bound. Beyond num_tiles tokens the bound is -inf: 4 whole passes
// Draw      a token beats the best score so far if its uniform number u is below 1 - exp(-exp(z - best)) <= exp(z -
//           best). The right side is one fp32 exp; the few tokens that pass are scored in fp64. The best score is that
//           of the likeliest token at first and is shared by a warp: the order cannot change the result
// Traffic   logits (1 MB a row at 262,144 tokens), which the head has just written into L2: once in draw, three times
//           in mass, and in the tiles above the bound four times in top-k; nothing of tiles below the threshold
// Bound     latency of 6 dependent launches for few rows; then fp64 exp of top-p and Philox (20 instructions a token)
// Numerics  z as the reference: fp32 products and quotients, each rounded once. Top-p adds exp(z - best) as two 39-bit
//           integers: any order gives the same bits, 2^-78 is lost per token. Tokens 64 below the best (1.6e-28) are
//           not counted; the nucleus ends above them for every top_p < 1 in fp32. Scores in fp64
// Resources ptxas -v, registers per thread (sm_80; sm_90a), no spills on 8.0, 8.6, 8.9, 9.0a: prepare 44; 46, mass 57;
//           52, draw 64; 64, finish 32; 32. Shared: prepare 2.4 KB, mass 33 KB, others below 1 KB
// Measured  not run on a GPU yet
// Source    Gumbel-max: Maddison et al. 2014, A* sampling, arXiv:1411.0030; Keskar et al. 2019, CTRL,
//           arXiv:1909.05858 (penalty); Holtzman et al. 2020, arXiv:1904.09751 (top-p); Nguyen et al. 2024,
//           arXiv:2407.01082 (min-p); Alabi et al. 2012, Fast k-selection algorithms for GPUs (radix select)
#include "csrc/cuda/sample.h"

#include <cmath>

#include "csrc/common/philox.h"
#include "csrc/cuda/device.cuh"
#include "csrc/cuda/dispatch.h"
#include "csrc/cuda/lm_head_stats.cuh"
#include "csrc/cuda/ptx.cuh"
#include "csrc/cuda/sample_nucleus.cuh"

namespace persimmon_fast::cuda {
namespace {

constexpr int kRowThreads = 512;     // of prepare
constexpr int kFinishThreads = 128;  // a row's few candidates

// Calls body(tile) by whole warps for the tiles of the row that pass; every warp of the block takes some.
template <typename Pass, typename Body>
DEV void for_each_tile(int num_tiles, const Pass& pass, const Body& body) {
  for (int begin = threadIdx.x / kWarpSize * kWarpSize; begin < num_tiles; begin += kRowThreads) {
    const int mine = begin + threadIdx.x % kWarpSize;
    unsigned passing = __ballot_sync(kFullMask, mine < num_tiles && pass(mine));
    __syncwarp();  // body may change what pass has read: a ballot does not order memory
    for (int tile = begin; passing != 0; passing >>= 1, ++tile) {
      if ((passing & 1) != 0) body(tile);
    }
  }
}

// ---- prepare ----

// For a place where several threads may store the same value at once.
DEV void store_atomically(float& place, float value) {
  unsigned bits;
  memcpy(&bits, &value, sizeof(bits));
  atomicExch(reinterpret_cast<unsigned*>(&place), bits);
}

// Penalises the row's logits once per token and renews the maxima of their tiles.
DEV void penalise(const SampleParams& p, int64_t row, const RowLogits& logits) {
  const int64_t* g_ids = p.penalty_ids + row * p.penalty_row_stride;
  float* g_bare = p.bare_logits + row * p.num_penalised;
  const float penalty = p.repetition_penalty[row];
  for (int64_t i = threadIdx.x; i < p.num_penalised; i += kRowThreads) {
    if (g_ids[i] >= 0 && g_ids[i] < p.vocab_size) g_bare[i] = logits.values[g_ids[i]];
  }
  __syncthreads();  // all bare logits are read before one is replaced: a token may occur twice
  for (int64_t i = threadIdx.x; i < p.num_penalised; i += kRowThreads) {
    const int64_t token = g_ids[i];
    if (token < 0 || token >= p.vocab_size) continue;
    const float logit = g_bare[i];
    store_atomically(logits.values[token], logit < 0.0f ? logit * penalty : logit / penalty);
    store_atomically(logits.tile_max[token / kVocabTile], NAN);  // to be renewed
  }
  __syncthreads();
  for_each_tile(
      logits.num_tiles, [&](int tile) { return logits.tile_max[tile] != logits.tile_max[tile]; },
      [&](int tile) {
        const float best =
            reduce_lanes<kWarpSize>(max4(lane_logits(logits, tile)), [](float a, float b) { return fmaxf(a, b); });
        if (threadIdx.x % kWarpSize == 0) logits.tile_max[tile] = best;
      });
  __syncthreads();
}

// The lowest token that has the row's largest logit, packed with it, in every thread.
DEV u64 best_token(const RowLogits& logits) {
  STATIC_SMEM(u64, s_best, kRowThreads / kWarpSize);
  u64 best = 0;
  for (int tile = threadIdx.x; tile < logits.num_tiles; tile += kRowThreads) {
    const u64 candidate = pack_best(logits.tile_max[tile], static_cast<uint32_t>(tile));
    best = candidate > best ? candidate : best;
  }
  const int tile =
      static_cast<int>(packed_token(block_reduce(best, u64{0}, s_best, [](u64 x) { return warp_max(x); })));
  const float4 v = lane_logits(logits, tile);
  const uint32_t token = static_cast<uint32_t>(tile) * kVocabTile + threadIdx.x % kWarpSize * 4;
  const u64 low = max(pack_best(v.x, token), pack_best(v.y, token + 1));
  const u64 high = max(pack_best(v.z, token + 2), pack_best(v.w, token + 3));
  return warp_max(max(low, high));
}

// The k-th largest of the keys that visit(body) gives to body(key), the same ones in each of four calls. k >= 1 and at
// most their number. By the whole block.
template <typename Visit>
DEV uint32_t radix_select(uint32_t k, const Visit& visit) {
  constexpr int kDigits = 256;
  constexpr int kDigitsPerLane = kDigits / kWarpSize;
  STATIC_SMEM(uint32_t, s_count, kDigits);
  STATIC_SMEM(uint32_t, s_found, 2);  // digit, k among the keys that have it
  uint32_t prefix = 0;
  uint32_t prefix_mask = 0;
#pragma unroll 1
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int digit = threadIdx.x; digit < kDigits; digit += kRowThreads) s_count[digit] = 0;
    __syncthreads();
    visit([&](uint32_t key) {
      if ((key & prefix_mask) == prefix) atomicAdd(&s_count[key >> shift & (kDigits - 1)], 1u);
    });
    __syncthreads();
    if (threadIdx.x < kWarpSize) {  // lane 0 has the largest digits
      const int top = kDigits - 1 - static_cast<int>(threadIdx.x) * kDigitsPerLane;
      uint32_t count = 0;
#pragma unroll
      for (int i = 0; i < kDigitsPerLane; ++i) count += s_count[top - i];
      uint32_t above = count;
#pragma unroll
      for (int distance = 1; distance < kWarpSize; distance *= 2) {
        const uint32_t below = __shfl_up_sync(kFullMask, above, distance);
        if (threadIdx.x >= static_cast<unsigned>(distance)) above += below;
      }
      above -= count;
      if (above < k && k <= above + count) {
        int digit = top;
        while (above + s_count[digit] < k) above += s_count[digit--];
        s_found[0] = static_cast<uint32_t>(digit);
        s_found[1] = k - above;
      }
    }
    __syncthreads();
    prefix |= s_found[0] << shift;
    prefix_mask |= uint32_t{kDigits - 1} << shift;
    k = s_found[1];
  }
  return prefix;
}

// The k-th largest z.
DEV float top_k_threshold(const RowLogits& logits, float divisor, uint32_t k) {
  uint32_t bound = 0;
  if (k <= static_cast<uint32_t>(logits.num_tiles)) {
    bound = radix_select(k, [&](const auto& body) {
      for (int tile = threadIdx.x; tile < logits.num_tiles; tile += kRowThreads) {
        body(order_key(logits.tile_max[tile] / divisor));
      }
    });
  }
  return from_order_key(radix_select(k, [&](const auto& body) {
    const auto visit = [&](int tile) {
      const float4 z = divide(lane_logits(logits, tile), divisor);
      const auto count = [&](float value) {
        const uint32_t key = order_key(value);
        if (key >= bound) body(key);
      };
      count(z.x);
      count(z.y);
      count(z.z);
      count(z.w);
    };
    if (bound == 0) {
#pragma unroll 4
      for (int tile = threadIdx.x / kWarpSize; tile < logits.num_tiles; tile += kRowThreads / kWarpSize) visit(tile);
    } else {
      for_each_tile(
          logits.num_tiles, [&](int tile) { return order_key(logits.tile_max[tile] / divisor) >= bound; }, visit);
    }
  }));
}

// The smallest number that is at least log(min_p) above best.
DEV float min_p_threshold(float best, float min_p) {
  if (!(min_p > 0.0f)) return -INFINITY;
  const double bound = static_cast<double>(best) + log(static_cast<double>(min_p));
  const float rounded = static_cast<float>(bound);
  return rounded < bound ? nextafterf(rounded, INFINITY) : rounded;
}

DEV double gumbel_score(float z, uint32_t word) { return z - log(-log1p(-philox_to_uniform(word))); }

__global__ void __launch_bounds__(kRowThreads, 2) sample_prepare_kernel(SampleParams p) {
  const int64_t row = blockIdx.x;
  const RowLogits logits = row_logits(p, row);
  const RowStats stats = merge_tiles<kRowThreads>(p.tiles, row, logits.num_tiles);
  SampleRow& state = p.rows[row];
  const float temperature = p.temperature[row];
  const bool greedy = !(temperature > 0.0f);
  bool decided = !is_finite(stats.max) || (greedy && p.penalty_ids == nullptr);
  int32_t token = stats.token;
  float divisor = 1.0f;
  float best = 0.0f;
  if (!decided) {
    if (p.penalty_ids != nullptr) penalise(p, row, logits);
    const u64 first = best_token(logits);
    token = static_cast<int32_t>(packed_token(first));
    divisor = greedy ? 1.0f : temperature;
    best = from_order_key(packed_key(first)) / divisor;
    decided = greedy || !is_finite(best);  // so small a temperature that z overflows takes its limit
  }
  const bool nucleus = !decided && p.top_p[row] < 1.0f;
  if (threadIdx.x == 0) {
    state.sum = stats.sum;
    state.max = stats.max;
    state.divisor = divisor;
    state.best = best;
    state.token = token;
    state.mode = decided ? SampleMode::kDecided : nucleus ? SampleMode::kNucleus : SampleMode::kDraw;
  }
  if (decided) return;

  if (nucleus) {
    FixedMass* g_mass = p.mass + row * kNucleusLevels * kNucleusBins;
    for (int bin = threadIdx.x; bin < kNucleusLevels * kNucleusBins; bin += kRowThreads) g_mass[bin] = {0, 0};
  }
  const int32_t k = p.top_k[row];
  const float threshold = k > 0 && k < p.vocab_size ? top_k_threshold(logits, divisor, k) : -INFINITY;
  if (threadIdx.x == 0) {
    state.top_k_threshold = threshold;
    state.min_p_threshold = min_p_threshold(best, p.min_p[row]);
    const PhiloxBlock words = philox(static_cast<uint64_t>(p.seeds[row]), static_cast<uint64_t>(p.offsets[row]),
                                     static_cast<uint32_t>(token) / 4);
    const int place = token % 4;
    const uint32_t word = place == 0   ? words.words[0]
                          : place == 1 ? words.words[1]
                          : place == 2 ? words.words[2]
                                       : words.words[3];
    state.first_score = gumbel_score(best, word);
  }
}

// ---- draw ----

struct Candidate {
  double score;
  int32_t token;
};

DEV Candidate better(Candidate a, Candidate b) {
  return b.score > a.score || (b.score == a.score && b.token < a.token) ? b : a;
}

// In thread 0 of the block: the best candidate of all threads.
template <int kThreads>
DEV Candidate block_best(Candidate best) {
  constexpr int kWarps = kThreads / kWarpSize;
  STATIC_SMEM(Candidate, s_best, kWarps);
#pragma unroll
  for (int lane_mask = kWarpSize / 2; lane_mask > 0; lane_mask /= 2) {
    best = better(
        best, {__shfl_xor_sync(kFullMask, best.score, lane_mask), __shfl_xor_sync(kFullMask, best.token, lane_mask)});
  }
  if (threadIdx.x % kWarpSize == 0) s_best[threadIdx.x / kWarpSize] = best;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kWarps; ++i) best = better(best, s_best[i]);
  return best;
}

// Nothing whose score is above `score` fails the fp32 test against this: the slack covers the roundings.
DEV float bar_of(double score) { return static_cast<float>(score - 1e-3 - 1e-6 * fabs(score)); }

__global__ void __launch_bounds__(kPassThreads) sample_draw_kernel(SampleParams p) {
  constexpr float kLog2E = 1.4426950408889634f;
  const int64_t row = blockIdx.y;
  const SampleRow& state = p.rows[row];
  if (state.mode == SampleMode::kDecided) return;
  float threshold = fmaxf(state.top_k_threshold, state.min_p_threshold);
  if (state.mode == SampleMode::kNucleus) {
    const uint32_t distance = narrow<kNucleusLevels - 1>(p, row).begin;
    threshold = fmaxf(threshold, from_order_key(order_key(state.best) - distance));
  }
  const RowLogits logits = row_logits(p, row);
  const uint64_t seed = static_cast<uint64_t>(p.seeds[row]);
  const uint64_t offset = static_cast<uint64_t>(p.offsets[row]);
  Candidate best{state.first_score, state.token};
  float bar = bar_of(best.score);
  const int end = min((static_cast<int>(blockIdx.x) + 1) * kTilesPerBlock, logits.num_tiles);
  for (int tile = blockIdx.x * kTilesPerBlock + threadIdx.x / kWarpSize; tile < end; tile += kPassThreads / kWarpSize) {
    // u > 2^-33 > e^-23: nothing further below the bar can win
    const float lowest = fmaxf(threshold, bar - 23.0f);
    if (logits.tile_max[tile] / state.divisor < lowest) continue;
    const float4 z = divide(lane_logits(logits, tile), state.divisor);
    const double before = best.score;
    if (max4(z) >= lowest) {
      const uint32_t block = static_cast<uint32_t>(tile) * (kVocabTile / 4) + threadIdx.x % kWarpSize;
      const PhiloxBlock random = philox(seed, offset, block);
      const auto consider = [&](float value, uint32_t word, int place) {
        const float chance = ptx::exp2_approx((value - bar) * kLog2E);
        if (value >= threshold && static_cast<float>(word >> 1) * 0x1p-31f <= chance) {
          best = better(best, {gumbel_score(value, word), static_cast<int32_t>(block * 4) + place});
        }
      };
      consider(z.x, random.words[0], 0);
      consider(z.y, random.words[1], 1);
      consider(z.z, random.words[2], 2);
      consider(z.w, random.words[3], 3);
    }
    if (__any_sync(kFullMask, best.score > before)) {
      bar = fmaxf(bar, bar_of(reduce_lanes<kWarpSize>(best.score, [](double a, double b) { return fmax(a, b); })));
    }
  }
  best = block_best<kPassThreads>(best);
  if (threadIdx.x == 0) {
    const int64_t place = row * gridDim.x + blockIdx.x;
    p.candidate_scores[place] = best.score;
    p.candidate_tokens[place] = best.token;
  }
}

__global__ void __launch_bounds__(kFinishThreads) sample_finish_kernel(SampleParams p) {
  STATIC_SMEM(int32_t, s_token, 1);
  STATIC_SMEM(int, s_place, 1);
  const int64_t row = blockIdx.x;
  const SampleRow& state = p.rows[row];
  const int num_blocks = static_cast<int>(num_draw_blocks(p.vocab_size));
  Candidate best{-INFINITY, state.token};
  if (state.mode != SampleMode::kDecided) {
    for (int i = threadIdx.x; i < num_blocks; i += kFinishThreads) {
      best = better(best, {p.candidate_scores[row * num_blocks + i], p.candidate_tokens[row * num_blocks + i]});
    }
  }
  best = block_best<kFinishThreads>(best);
  if (threadIdx.x == 0) {
    s_token[0] = best.token;
    s_place[0] = -1;
  }
  __syncthreads();
  const int32_t token = s_token[0];
  if (p.penalty_ids != nullptr && is_finite(state.max)) {  // other rows were not penalised
    for (int64_t i = threadIdx.x; i < p.num_penalised; i += kFinishThreads) {
      if (p.penalty_ids[row * p.penalty_row_stride + i] == token) atomicExch(&s_place[0], static_cast<int>(i));
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    const float logit =
        s_place[0] >= 0 ? p.bare_logits[row * p.num_penalised + s_place[0]] : row_logits(p, row).values[token];
    p.token_ids[row] = token;
    p.logprobs[row] = logprob(logit, state.max, state.sum);
  }
}

}  // namespace

cudaError_t launch_sample(const SampleParams& p, cudaStream_t stream) {
  if (p.num_rows == 0) return cudaSuccess;
  if (p.num_rows > UINT16_MAX || p.vocab_size > kMaxSampleVocab || p.num_penalised > INT32_MAX) {
    return kTooLarge;
  }
  const unsigned num_rows = static_cast<unsigned>(p.num_rows);
  const dim3 pass_grid(static_cast<unsigned>(num_draw_blocks(p.vocab_size)), num_rows);
  cudaError_t error = launch("sample_prepare", sample_prepare_kernel, num_rows, kRowThreads, 0, stream, p);
  if (error == cudaSuccess) error = launch("sample_mass", sample_mass_kernel<0>, pass_grid, kPassThreads, 0, stream, p);
  if (error == cudaSuccess) error = launch("sample_mass", sample_mass_kernel<1>, pass_grid, kPassThreads, 0, stream, p);
  if (error == cudaSuccess) error = launch("sample_mass", sample_mass_kernel<2>, pass_grid, kPassThreads, 0, stream, p);
  if (error == cudaSuccess) error = launch("sample_draw", sample_draw_kernel, pass_grid, kPassThreads, 0, stream, p);
  if (error == cudaSuccess)
    error = launch("sample_finish", sample_finish_kernel, num_rows, kFinishThreads, 0, stream, p);
  return error;
}

}  // namespace persimmon_fast::cuda
