// flash_attention_kernel: out[i] = sum_j w_ij v_j / l_i,  w_ij = exp(scale q_i k_j - m_i),  l_i = sum_j w_ij,
//                         lse[i] = m_i + log l_i;  j < number of keys that query i sees
// flash_attention_fp32_kernel: the same on CUDA cores, one warp per query
//
// Tile      one block = 128 queries of one head and sequence, 4 warps x 32 queries (two m16 tiles: each fragment of k
//           and v feeds two products). Keys in tiles of 64 (head_dim 64) or 32 (128): at twice that 255 registers, and
//           head_dim 64 spills. Queries stay in shared memory, weights in registers: the accumulator layout of q k^T
//           is half an A fragment of w v
// Schedule  k and v double-buffered by cp.async, a commit group each: q k^T waits for the keys alone, and each load
//           has the time of one tile to arrive. Causal: tiles beyond the last query are skipped, per block and per
//           warp; only tiles that cross the diagonal or the end are masked; blocks with most keys start first
// Traffic   q read and out, lse written once; k and v read once per 128 queries, mostly from L2
// Bound     tensor cores, then exp2: at head_dim 64 a weight is 256 flops, so full rate on sm_80 is 8 weights per
//           clock and multiprocessor, of 16 exp2 that it can do; on sm_90 16 of 16
// Resources ptxas -v on 8.0, 8.6, 8.9, 9.0a alike: 222 registers at head_dim 64, 242 at 128, no spills, no stack; 48
//           KiB and 64 KiB of shared memory: 2 blocks per multiprocessor (one on 8.6 and 8.9 at head_dim 128). fp32:
//           47 and 64 registers, none shared
// Numerics  scores, softmax and sums in fp32, weights rounded to the dtype before w v but not before l. m_i follows
//           the true maximum only when that grows by more than a factor of 2^8 in weight: rescaling is rare, and fp32
//           and fp16 have the room. The bits of a row depend on its keys, its number and head_dim alone: not on batch,
//           strides, alignment or pages. NaN and inf reach the queries that see them and no other (see repeat_rows)
// Requires  head_dim 64 or 128, last dimensions dense (csrc/ops/cuda). Rows of any alignment; cp.async where it is 16
//           bytes. On compute capability 9.0 flash_attention_sm90.cu takes most calls
// Measured  not run on a GPU yet
// Source    Dao 2023, FlashAttention-2, arXiv:2307.08691 (schedule); Milakov and Gimelshein 2018, arXiv:1805.02867
//           (online softmax); rescaling only beyond a threshold: FlashAttention-4; kernel written for this project.
//           docs/kernels/flash_attention.md
#include "csrc/cuda/flash_attention.h"

#include <cstdint>
#include <type_traits>

#include "csrc/cuda/attention.cuh"
#include "csrc/cuda/device_limits.h"
#include "csrc/cuda/dispatch.h"
#include "csrc/cuda/flash_attention_sm90.h"
#include "csrc/cuda/launch_sm90.cuh"

namespace persimmon_fast::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kRowTiles = 2;  // of 16 queries, per warp: each K or V fragment feeds two products
constexpr int kWarpRows = 16 * kRowTiles;
constexpr int kBlockM = kWarps * kWarpRows;
constexpr int kStages = 2;
template <int kHeadDim>
constexpr int kBlockN = kHeadDim == 64 ? 64 : 32;

template <int kHeadDim>
constexpr size_t kSmemBytes = (kBlockM + 2 * kStages * kBlockN<kHeadDim>)*kHeadDim * 2;
static_assert(kSmemBytes<64> <= kMaxSmemBytes && kSmemBytes<128> <= kMaxSmemBytes);

// Block -> (tile of queries, head, sequence). The last tile of every head and sequence first: with a causal mask it
// has the most keys, and short tiles fill the end.
struct Work {
  int tile_idx;
  int head_idx;
  int sequence_idx;
};
DEV Work work_of_block(const AttentionParams& p) {
  const unsigned num_pairs = static_cast<unsigned>(p.num_heads) * static_cast<unsigned>(p.batch_size);
  const unsigned pair_idx = blockIdx.x % num_pairs;
  Work work;
  work.tile_idx = static_cast<int>((gridDim.x - 1 - blockIdx.x) / num_pairs);
  work.head_idx = static_cast<int>(pair_idx % p.num_heads);
  work.sequence_idx = static_cast<int>(pair_idx / p.num_heads);
  return work;
}

// Rows first .. first + kRows of keys, values or queries; zeros from `end` on.
template <int kHeadDim, int kRows, typename scalar_t, typename RowPointer>
DEV void load_tile(scalar_t* s_tile, RowPointer row_pointer, int first, int end, bool aligned) {
  constexpr int kChunks = Tile<kHeadDim>::kChunks;
#pragma unroll
  for (int i = 0; i < kRows * kChunks / kThreads; ++i) {
    const int row = (i * kThreads + threadIdx.x) / kChunks;
    const int chunk = threadIdx.x % kChunks;
    const bool valid = first + row < end;
    const scalar_t* g_row = row_pointer(valid ? first + row : end - 1);
    copy_chunk(reinterpret_cast<unsigned char*>(s_tile) + Tile<kHeadDim>::offset(row, chunk), g_row + chunk * 8, valid,
               aligned);
  }
}

// What a lane of a warp keeps of its rows: row 16 m + 8 h + lane / 4 is slot 2 m + h.
template <typename scalar_t, int kHeadDim>
struct WarpState {
  static constexpr int kN = kBlockN<kHeadDim>;
  static constexpr int kSlots = 2 * kRowTiles;
  using Scores = float[kRowTiles][kN / 8][4];
  using Weights = uint32_t[kRowTiles][kN / 16][4];

  float maximum[kSlots];      // bare dot products
  float denominator[kSlots];  // of this lane's columns
  float acc[kRowTiles][kHeadDim / 8][4];

  DEV void clear() {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      maximum[slot] = -INFINITY;
      denominator[slot] = 0.0f;
    }
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[m][n][i] = 0.0f;
      }
    }
  }

  // Online softmax over a tile: scores become weights, relative to `maximum`.
  DEV void softmax(Scores& scores, Weights& weights, float scale_log2) {
    const float slack = maximum_slack(scale_log2);
    float correction[kSlots];
    bool moved = false;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      correction[slot] =
          softmax_row(scores[slot / 2], slot % 2 * 2, maximum[slot], denominator[slot], scale_log2, slack);
      moved |= correction[slot] != 1.0f;
    }
    if (__any_sync(kFullMask, moved)) {  // rare after the first tiles; a factor of 1 changes no bit
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
#pragma unroll
        for (int n = 0; n < kHeadDim / 8; ++n) {
          acc[slot / 2][n][slot % 2 * 2] *= correction[slot];
          acc[slot / 2][n][slot % 2 * 2 + 1] *= correction[slot];
        }
      }
    }
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kN / 8; ++n) {  // an accumulator's layout is half of an A fragment's
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          weights[m][n / 2][n % 2 * 2 + h] = pack2(scores[m][n][2 * h], scores[m][n][2 * h + 1], scalar_t());
        }
      }
    }
  }
};

// Writes the rows of a warp.
template <typename scalar_t, int kHeadDim>
DEV void store_rows(const AttentionParams& p, const Sequence& s, const WarpState<scalar_t, kHeadDim>& state,
                    int head_idx, int warp_row, const Rows<scalar_t>& k, const Rows<scalar_t>& v) {
  const int lane = threadIdx.x % kWarpSize;
  unsigned again[2 * kRowTiles];  // a bit for each lane
#pragma unroll
  for (int slot = 0; slot < 2 * kRowTiles; ++slot) {
    const int m = slot / 2;
    const int i = slot % 2 * 2;
    const int row = warp_row + m * 16 + slot % 2 * 8 + lane / 4;
    float probe = 0.0f;
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
      probe = fmaf(state.acc[m][n][i], 0.0f, probe);
      probe = fmaf(state.acc[m][n][i + 1], 0.0f, probe);
    }
    const float denominator = quad_sum(state.denominator[slot]);
    const bool in_range = row < s.num_queries;
    again[slot] = __ballot_sync(kFullMask, p.causal && in_range && probe != 0.0f);
    if (!in_range) continue;
    if (p.lse != nullptr && lane % 4 == 0) {
      p.lse[head_idx * p.total_q + s.q_begin + row] = softmax_lse(p, state.maximum[slot], denominator);
    }
    if ((again[slot] >> (lane / 4 * 4) & 0xfu) != 0) continue;
    const float factor = reciprocal(denominator);
    scalar_t* g_out = out_row<scalar_t, kHeadDim>(p, s, head_idx, row);
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
      *reinterpret_cast<uint32_t*>(g_out + n * 8 + lane % 4 * 2) =
          pack2(state.acc[m][n][i] * factor, state.acc[m][n][i + 1] * factor, scalar_t());
    }
  }
#pragma unroll
  for (int slot = 0; slot < 2 * kRowTiles; ++slot) {
    repeat_rows<scalar_t, kHeadDim>(p, s, head_idx, warp_row + slot * 8, again[slot], k, v);
  }
}

template <typename scalar_t, int kHeadDim>
__global__ void __launch_bounds__(kThreads, 2) flash_attention_kernel(AttentionParams p) {
  using T = Tile<kHeadDim>;
  using State = WarpState<scalar_t, kHeadDim>;
  constexpr int kN = kBlockN<kHeadDim>;
  SMEM_CARVER(smem);
  scalar_t* s_q = smem.take<scalar_t>(kBlockM * kHeadDim, 128);
  scalar_t* s_k = smem.take<scalar_t>(kStages * kN * kHeadDim, 128);
  scalar_t* s_v = smem.take<scalar_t>(kStages * kN * kHeadDim, 128);
  const auto stage = [](int tile_idx) { return tile_idx % kStages * kN * kHeadDim; };

  const Work work = work_of_block(p);
  const Sequence s = load_sequence(p, work.sequence_idx);
  const int q_begin = work.tile_idx * kBlockM;
  if (q_begin >= s.num_queries) return;
  const int lane = threadIdx.x % kWarpSize;
  const int warp_row = q_begin + threadIdx.x / kWarpSize * kWarpRows;
  // Keys that some query of the block sees, of the warp sees, that each query of the warp sees.
  const int block_keys = num_visible_keys(p, s, min(q_begin + kBlockM, s.num_queries) - 1);
  const int warp_keys = min(block_keys, num_visible_keys(p, s, warp_row + kWarpRows - 1));
  const int unmasked_keys = num_visible_keys(p, s, warp_row);
  const int num_tiles = block_keys > 0 ? ceil_div(block_keys, kN) : 0;
  const Rows<scalar_t> k = key_rows<scalar_t>(p, s, work.sequence_idx, work.head_idx);
  const Rows<scalar_t> v = value_rows<scalar_t>(p, s, work.sequence_idx, work.head_idx);

  if (num_tiles > 0) {
    const auto q = [&](int row) { return query_row<scalar_t>(p, s, work.head_idx, row); };
    load_tile<kHeadDim, kBlockM>(s_q, q, q_begin, s.num_queries, p.aligned);
    load_tile<kHeadDim, kN>(s_k, k, 0, block_keys, p.aligned);
    ptx::cp_async_commit();
    load_tile<kHeadDim, kN>(s_v, v, 0, block_keys, p.aligned);
    ptx::cp_async_commit();
  }
  const float scale_log2 = positive_scale_log2(p);
  const uint32_t sign_bits = p.softmax_scale < 0.0f ? 0x80008000u : 0u;
  const uint32_t warp_q = ptx::smem_u32(s_q) + threadIdx.x / kWarpSize * kWarpRows * T::kRowBytes;
  State state;
  state.clear();

  // Per tile two barriers: the first says that its keys are here and that nobody reads the previous keys any more, the
  // second says so of the values. Each load has the time of one whole tile to arrive.
#pragma unroll 1
  for (int tile_idx = 0; tile_idx < num_tiles; ++tile_idx) {
    const int key_begin = tile_idx * kN;
    const bool active = key_begin < warp_keys;  // uniform over the warp
    const bool has_next = tile_idx + 1 < num_tiles;
    ptx::cp_async_wait<1>();
    __syncthreads();
    if (has_next) load_tile<kHeadDim, kN>(s_k + stage(tile_idx + 1), k, key_begin + kN, block_keys, p.aligned);
    ptx::cp_async_commit();  // an empty group keeps the count

    typename State::Weights weights;
    if (active) {
      typename State::Scores scores = {};
      const uint32_t k_tile = ptx::smem_u32(s_k + stage(tile_idx));
#pragma unroll
      for (int dim = 0; dim < kHeadDim; dim += 16) {
        uint32_t r_q[kRowTiles][4];
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          T::load_queries(r_q[m], warp_q, m * 16, dim, lane);
#pragma unroll
          for (int i = 0; i < 4; ++i) r_q[m][i] ^= sign_bits;
        }
#pragma unroll
        for (int key = 0; key < kN; key += 16) {
          uint32_t r_k[4];
          T::load_keys(r_k, k_tile, key, dim, lane);
#pragma unroll
          for (int m = 0; m < kRowTiles; ++m) {
            mma_pair<scalar_t>(scores[m][key / 8], scores[m][key / 8 + 1], r_q[m], r_k);
          }
        }
      }
      if (key_begin + kN > unmasked_keys) {
#pragma unroll
        for (int slot = 0; slot < 2 * kRowTiles; ++slot) {
          const int row = warp_row + slot * 8 + lane / 4;
          const int num_visible = num_visible_keys(p, s, row) - key_begin - lane % 4 * 2;
#pragma unroll
          for (int n = 0; n < kN / 8; ++n) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
              float& score = scores[slot / 2][n][slot % 2 * 2 + j];
              if (n * 8 + j >= num_visible) score = -INFINITY;
            }
          }
        }
      }
      state.softmax(scores, weights, scale_log2);
    }

    ptx::cp_async_wait<1>();
    __syncthreads();
    if (has_next) load_tile<kHeadDim, kN>(s_v + stage(tile_idx + 1), v, key_begin + kN, block_keys, p.aligned);
    ptx::cp_async_commit();
    if (active) {
      const uint32_t v_tile = ptx::smem_u32(s_v + stage(tile_idx));
#pragma unroll
      for (int key = 0; key < kN; key += 16) {
#pragma unroll
        for (int dim = 0; dim < kHeadDim; dim += 16) {
          uint32_t r_v[4];
          T::load_values(r_v, v_tile, key, dim, lane);
#pragma unroll
          for (int m = 0; m < kRowTiles; ++m) {
            mma_pair<scalar_t>(state.acc[m][dim / 8], state.acc[m][dim / 8 + 1], weights[m][key / 16], r_v);
          }
        }
      }
    }
  }
  store_rows(p, s, state, work.head_idx, warp_row, k, v);
}

// fp32: one query per warp.
template <int kHeadDim>
__global__ void __launch_bounds__(kThreads) flash_attention_fp32_kernel(AttentionParams p) {
  const Work work = work_of_block(p);
  const Sequence s = load_sequence(p, work.sequence_idx);
  const int query_idx = work.tile_idx * kWarps + threadIdx.x / kWarpSize;
  if (query_idx >= s.num_queries) return;  // whole warps: no barrier follows
  const Rows<float> k = key_rows<float>(p, s, work.sequence_idx, work.head_idx);
  const Rows<float> v = value_rows<float>(p, s, work.sequence_idx, work.head_idx);
  RowAttention<kHeadDim> row;
  row.run(p, query_row<float>(p, s, work.head_idx, query_idx), k, v, 0, num_visible_keys(p, s, query_idx));
  row.store(out_row<float, kHeadDim>(p, s, work.head_idx, query_idx), reciprocal(row.denominator));
  if (p.lse != nullptr && threadIdx.x % kWarpSize == 0) {
    p.lse[work.head_idx * p.total_q + s.q_begin + query_idx] = softmax_lse(p, row.maximum, row.denominator);
  }
}

template <typename scalar_t, int kHeadDim>
cudaError_t launch_typed(AttentionParams p, cudaStream_t stream) {
  const unsigned num_blocks = static_cast<unsigned>(flash_attention_num_blocks(p));
  p.aligned = rows_are_aligned<scalar_t>(p);
  if constexpr (std::is_same_v<scalar_t, float>) {
    return launch("flash_attention_fp32", flash_attention_fp32_kernel<kHeadDim>, num_blocks, kThreads, 0, stream, p);
  } else {
    return launch("flash_attention", flash_attention_kernel<scalar_t, kHeadDim>, num_blocks, kThreads,
                  kSmemBytes<kHeadDim>, stream, p);
  }
}

}  // namespace

int64_t flash_attention_num_blocks(const AttentionParams& p) {
  const int64_t rows_per_block = p.dtype == DType::kFloat32 ? kWarps : kBlockM;
  return ceil_div<int64_t>(p.max_seqlen_q, rows_per_block) * p.num_heads * p.batch_size;
}

cudaError_t launch_flash_attention(const AttentionParams& params, cudaStream_t stream) {
  const int64_t num_blocks = flash_attention_num_blocks(params);
  if (num_blocks == 0) return cudaSuccess;
  if (num_blocks > INT32_MAX) return kTooLarge;
  if constexpr (kBuiltSm90a) {
    DeviceLimits limits;
    if (const cudaError_t error = device_limits(limits); error != cudaSuccess) return error;
    if (limits.runs_sm90a && flash_attention_sm90_takes(params)) return launch_flash_attention_sm90(params, stream);
  }
  return dispatch_dtype(params.dtype, [&](auto scalar) {
    return dispatch_head_dim(params.head_dim, [&](auto head_dim) {
      return launch_typed<decltype(scalar), decltype(head_dim)::value>(params, stream);
    });
  });
}

}  // namespace persimmon_fast::cuda
