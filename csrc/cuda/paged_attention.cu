// paged_attention_kernel: up to 16 queries per sequence over its pages of keys, split over blocks
// paged_attention_combine_kernel: out = sum_s w_s acc_s / sum_s w_s l_s,  w_s = exp(m_s - max m);  s: splits
//
// Work      one block = (sequence, head, range of keys), 4 warps. A warp takes every fourth slice of 16 keys: it loads
//           the slice by cp.async into a ring of its own (3 stages), multiplies it by the m16 tile of queries
//           (mma.sync, rows beyond the queries are zeros) and waits for no other warp. At the end the warps are added
//           up in shared memory
// Splits    paged_attention_splits.h: as many as fill the GPU once are launched; number and range of those of a
// sequence
//           follow from its length on the device. All are equally long but the last; the others leave
// Combine   a second kernel, none for a single split. The last block to arrive could do it, but needs counters that
//           start at zero: a memset, which is a launch too, or state that two streams would share
// Traffic   keys and values once: 4 head_dim bytes per key and head. Partial results: 4 (head_dim + 2) bytes per
//           query, head and split, written and read; 0.08 % for one query, 16,384 keys, 6 splits, head_dim 64
// Bound     memory: 1 to 16 queries are 1 to 16 flops per byte. In flight per block: 32 KiB at head_dim 64, 64 KiB at
//           128
// Resources ptxas -v (sm_80; sm_90a), registers: 125; 124 at head_dim 64, 158; 168 at 128, combination 32. No spills
//           and no stack on 8.0, 8.6, 8.9, 9.0a. Shared 48 KiB and 96 KiB. Blocks per multiprocessor at head_dim 64
//           and 128: 3 and 1 on 8.0, 4 and 2 on 9.0, 2 and 1 on 8.6 and 8.9
// Numerics  as flash_attention.cu, but with the true maximum; splits and warps are added in their order: the same bits
//           on every run. They change with the number of splits, so with batch_size and the GPU, not with max_pages
// Requires  fp16 or bf16, head_dim 64 or 128; k_cache and v_cache of one shape, contiguous. Pages of a multiple of 16
//           keys are looked up once per slice, ahead of the load, others once per key
// Measured  not run on a GPU yet
// Source    Dao et al. 2023, Flash-Decoding (splits, combination); Kwon et al. 2023, arXiv:2309.06180 (pages); kernel
//           written for this project. docs/kernels/paged_attention.md
#include "csrc/cuda/paged_attention.h"

#include <algorithm>
#include <cstdint>

#include "csrc/cuda/attention.cuh"
#include "csrc/cuda/dispatch.h"

namespace persimmon_fast::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kQueries = 16;  // of the tile
static_assert(kQueries == kPagedMaxQueries);
constexpr int kSliceKeys = 16;  // what a warp loads and multiplies at a time
constexpr int kRoundKeys = kWarps * kSliceKeys;
constexpr int kStages = 3;

template <int kHeadDim>
constexpr int kSliceElements = 2 * kSliceKeys * kHeadDim;  // keys, then values
template <int kHeadDim>
constexpr size_t kSmemBytes = kWarps * (kStages * kSliceElements<kHeadDim> * 2 + sizeof(unsigned));
static_assert(kSmemBytes<64> <= kMaxSmemBytes && kSmemBytes<128> <= kMaxSmemBytes);

// A warp's result in shared memory, over its ring: [kQueries][kMergeStride] sums of values, then maxima, denominators.
// The padding spreads the rows of a fragment over the banks.
template <int kHeadDim>
constexpr int kMergeStride = kHeadDim + 8;
template <int kHeadDim>
constexpr bool kMergeFits = kQueries * (kMergeStride<kHeadDim> + 2) * 4 <= kStages * kSliceElements<kHeadDim> * 2;
static_assert(kMergeFits<64> && kMergeFits<128>);

// How the keys of one sequence are cut.
struct Splits {
  int num;     // with rounding the last of them may be empty
  int length;  // keys of each but the last

  DEV Splits(const AttentionParams& p, int num_keys) : num(paged_attention_splits_of(num_keys, p.num_splits)) {
    length = ceil_div(ceil_div(num_keys, num), kRoundKeys) * kRoundKeys;
  }
};

DEV int64_t partial_idx(const AttentionParams& p, int sequence_idx, int query_idx, int head_idx, int split_idx) {
  return ((sequence_idx * p.max_seqlen_q + query_idx) * p.num_heads + head_idx) * p.num_splits + split_idx;
}

// A warp's share of the keys of a block: slices of kSliceKeys, kRoundKeys apart, through a ring of kStages.
template <typename scalar_t, int kHeadDim>
struct SliceLoader {
  scalar_t* s_ring;  // of the warp
  Rows<scalar_t> k;
  Rows<scalar_t> v;
  int first_key;
  int end;
  bool aligned;
  bool one_page;  // every slice lies in one page
  int next_page;  // of the slice that is loaded next: the lookup would otherwise stand before every load

  DEV scalar_t* stage(int slice_idx) const { return s_ring + slice_idx % kStages * kSliceElements<kHeadDim>; }

  DEV void look_up(int slice_idx) {
    const int key_idx = first_key + slice_idx * kRoundKeys;
    if (one_page && key_idx < end)
      next_page = k.pages[static_cast<unsigned>(key_idx) / static_cast<unsigned>(k.page_size)];
  }

  // Commits one group, empty beyond the last slice. Rows from `end` on become zeros and are not read.
  DEV void load(int slice_idx) {
    constexpr int kChunks = Tile<kHeadDim>::kChunks;
    const int lane = threadIdx.x % kWarpSize;
    const int key_begin = first_key + slice_idx * kRoundKeys;
    if (key_begin < end) {
      unsigned char* s_k = reinterpret_cast<unsigned char*>(stage(slice_idx));
      unsigned char* s_v = s_k + kSliceKeys * Tile<kHeadDim>::kRowBytes;
      const scalar_t* g_slice = one_page ? k.in_page(next_page, key_begin) : nullptr;
#pragma unroll
      for (int i = 0; i < kSliceKeys * kChunks / kWarpSize; ++i) {
        const int row = (i * kWarpSize + lane) / kChunks;
        const int chunk = lane % kChunks;
        const bool valid = key_begin + row < end;
        const int key_idx = valid ? key_begin + row : end - 1;
        const scalar_t* g_k = one_page ? g_slice + (key_idx - key_begin) * k.token_stride : k(key_idx);
        const scalar_t* g_v = v.head + (g_k - k.head);  // both caches have one shape
        const int offset = Tile<kHeadDim>::offset(row, chunk);
        copy_chunk(s_k + offset, g_k + chunk * 8, valid, aligned);
        copy_chunk(s_v + offset, g_v + chunk * 8, valid, aligned);
      }
      look_up(slice_idx + 1);
    }
    ptx::cp_async_commit();
  }
};

// A fragments of the queries, zeros beyond the last. Straight from memory: one row is 128 or 256 bytes.
template <typename scalar_t, int kHeadDim>
DEV void load_queries(uint32_t (&r_q)[kHeadDim / 16][4], const AttentionParams& p, const Sequence& s, int head_idx) {
  const int lane = threadIdx.x % kWarpSize;
  const float sign = q_sign(p);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i % 2 * 8;
    const scalar_t* g_q = query_row<scalar_t>(p, s, head_idx, min(row, s.num_queries - 1)) + i / 2 * 8 + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < kHeadDim / 16; ++n) {
      const float low = row < s.num_queries ? sign * to_float(g_q[n * 16]) : 0.0f;
      const float high = row < s.num_queries ? sign * to_float(g_q[n * 16 + 1]) : 0.0f;
      r_q[n][i] = pack2(low, high, scalar_t());
    }
  }
}

// What a lane of a warp keeps of the 16 queries: row 8 h + lane / 4 is slot h.
template <typename scalar_t, int kHeadDim>
struct WarpState {
  float maximum[2] = {-INFINITY, -INFINITY};  // bare dot products
  float denominator[2] = {};                  // of this lane's columns
  float acc[kHeadDim / 8][4] = {};

  // A slice of keys and values in shared memory. num_visible: of the slice's keys, for each slot.
  DEV void attend(uint32_t s_k, const uint32_t (&r_q)[kHeadDim / 16][4], const int (&num_visible)[2],
                  float scale_log2) {
    using T = Tile<kHeadDim>;
    const int lane = threadIdx.x % kWarpSize;
    float scores[2][4] = {};
#pragma unroll
    for (int n = 0; n < kHeadDim / 16; ++n) {
      uint32_t r_k[4];
      T::load_keys(r_k, s_k, 0, n * 16, lane);
      mma_pair<scalar_t>(scores[0], scores[1], r_q[n], r_k);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float slice_maximum = maximum[h];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float& score = scores[j / 2][2 * h + j % 2];
        if (j / 2 * 8 + lane % 4 * 2 + j % 2 >= num_visible[h]) score = -INFINITY;
        slice_maximum = fmaxf(slice_maximum, score);
      }
      slice_maximum = quad_max(slice_maximum);
      const float correction = rescale(maximum[h], slice_maximum, scale_log2);
      const float offset = scaled_maximum(slice_maximum, scale_log2);
      maximum[h] = slice_maximum;
      denominator[h] *= correction;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float& score = scores[j / 2][2 * h + j % 2];
        score = ptx::exp2_approx(fmaf(score, scale_log2, -offset));
        denominator[h] += score;
      }
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
        acc[n][2 * h] *= correction;
        acc[n][2 * h + 1] *= correction;
      }
    }
    uint32_t weights[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      weights[i] = pack2(scores[i / 2][i % 2 * 2], scores[i / 2][i % 2 * 2 + 1], scalar_t());
    }
    const uint32_t s_v = s_k + kSliceKeys * T::kRowBytes;
#pragma unroll
    for (int n = 0; n < kHeadDim / 16; ++n) {
      uint32_t r_v[4];
      T::load_values(r_v, s_v, 0, n * 16, lane);
      mma_pair<scalar_t>(acc[2 * n], acc[2 * n + 1], weights, r_v);
    }
  }

  // To the warp's place in shared memory. Returns the rows that are not finite, a bit each.
  DEV unsigned store(float* s_merge) {
    constexpr int kStride = kMergeStride<kHeadDim>;
    const int lane = threadIdx.x % kWarpSize;
    unsigned rows = 0;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = lane / 4 + 8 * h;
      float probe = 0.0f;
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
        *reinterpret_cast<float2*>(s_merge + row * kStride + n * 8 + lane % 4 * 2) =
            make_float2(acc[n][2 * h], acc[n][2 * h + 1]);
        probe = fmaf(acc[n][2 * h], 0.0f, fmaf(acc[n][2 * h + 1], 0.0f, probe));
      }
      const float sum = quad_sum(denominator[h]);
      if (lane % 4 == 0) {
        s_merge[kQueries * kStride + row] = maximum[h];
        s_merge[kQueries * (kStride + 1) + row] = sum;
      }
      const unsigned lanes = __ballot_sync(kFullMask, probe != 0.0f);
#pragma unroll
      for (int g = 0; g < 8; ++g) rows |= ((lanes >> (4 * g) & 0xfu) != 0 ? 1u : 0u) << (8 * h + g);
    }
    return rows;
  }
};

// One element of a row's result: to out where the keys are in one piece, else to the partial results.
template <typename scalar_t, int kHeadDim>
struct RowWriter {
  const AttentionParams& p;
  scalar_t* g_out;   // null: partial
  float* g_partial;  // [head_dim]
  float* g_stat;     // [2]

  DEV RowWriter(const AttentionParams& params, const Sequence& s, int sequence_idx, int query_idx, int head_idx,
                int split_idx)
      : p(params) {
    const bool partial = Splits(p, s.num_keys).num > 1;
    const int64_t idx = partial_idx(p, sequence_idx, query_idx, head_idx, split_idx);
    g_out = partial ? nullptr : out_row<scalar_t, kHeadDim>(p, s, head_idx, query_idx);
    g_partial = partial ? p.partial_out + idx * kHeadDim : nullptr;
    g_stat = partial ? p.partial_stat + idx * 2 : nullptr;
  }
  DEV void write(int dim, float acc, float denominator) const {
    if (g_out != nullptr) {
      from_float(acc * reciprocal(denominator), g_out[dim]);
    } else {
      g_partial[dim] = acc;
    }
  }
  DEV void write_stat(float maximum, float denominator) const {
    if (g_stat != nullptr) *reinterpret_cast<float2*>(g_stat) = make_float2(maximum, denominator);
  }
};

// Adds up the warps of the block, in their order. Rows of `again` are left out.
template <typename scalar_t, int kHeadDim>
DEV void merge_warps(const AttentionParams& p, const Sequence& s, const float* s_merge, int warp_stride,
                     int sequence_idx, int head_idx, int split_idx, unsigned again) {
  constexpr int kStride = kMergeStride<kHeadDim>;
  const float scale_log2 = positive_scale_log2(p);
  for (int i = threadIdx.x; i < s.num_queries * kHeadDim; i += kThreads) {
    const int row = i / kHeadDim;
    const int dim = i % kHeadDim;
    if ((again >> row & 1u) != 0) continue;
    const float* s_maximum = s_merge + kQueries * kStride + row;
    float maximum = -INFINITY;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) maximum = fmaxf(maximum, s_maximum[warp * warp_stride]);
    float acc = 0.0f;
    float denominator = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      const float weight = rescale(s_maximum[warp * warp_stride], maximum, scale_log2);
      acc = fmaf(weight, s_merge[warp * warp_stride + row * kStride + dim], acc);
      denominator = fmaf(weight, s_maximum[warp * warp_stride + kQueries], denominator);
    }
    const RowWriter<scalar_t, kHeadDim> writer(p, s, sequence_idx, row, head_idx, split_idx);
    writer.write(dim, acc, denominator);
    if (dim == 0) writer.write_stat(maximum, denominator);
  }
}

template <typename scalar_t, int kHeadDim>
__global__ void __launch_bounds__(kThreads) paged_attention_kernel(AttentionParams p) {
  ptx::launch_dependents();  // the projection that follows may order its weights
  SMEM_CARVER(smem);
  scalar_t* s_ring = smem.take<scalar_t>(kWarps * kStages * kSliceElements<kHeadDim>, 128);
  unsigned* s_again = smem.take<unsigned>(kWarps);
  const int split_idx = static_cast<int>(blockIdx.x % p.num_splits);
  const int pair_idx = static_cast<int>(blockIdx.x / p.num_splits);
  const int head_idx = pair_idx % p.num_heads;
  const int sequence_idx = pair_idx / p.num_heads;
  Sequence s = load_sequence(p, sequence_idx);
  s.num_queries = min(s.num_queries, static_cast<int>(p.max_seqlen_q));  // the tile and the partials hold no more
  const Splits splits(p, s.num_keys);
  const int begin = split_idx * splits.length;
  if (s.num_queries <= 0 || (begin >= s.num_keys && split_idx > 0)) return;  // the combination leaves such splits out
  const int end = min(begin + splits.length, s.num_keys);
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;

  SliceLoader<scalar_t, kHeadDim> loader;
  constexpr int kWarpElements = kStages * kSliceElements<kHeadDim>;
  loader.s_ring = s_ring + warp * kWarpElements;
  loader.k = key_rows<scalar_t>(p, s, sequence_idx, head_idx);
  loader.v = value_rows<scalar_t>(p, s, sequence_idx, head_idx);
  loader.first_key = begin + warp * kSliceKeys;
  loader.end = end;
  loader.aligned = p.aligned;
  loader.one_page = p.page_size % kSliceKeys == 0;
  loader.next_page = 0;
  loader.look_up(0);
#pragma unroll
  for (int slice_idx = 0; slice_idx < kStages - 1; ++slice_idx) loader.load(slice_idx);

  uint32_t r_q[kHeadDim / 16][4];
  load_queries<scalar_t, kHeadDim>(r_q, p, s, head_idx);
  const float scale_log2 = positive_scale_log2(p);
  const int visible[2] = {num_visible_keys(p, s, lane / 4), num_visible_keys(p, s, lane / 4 + 8)};
  WarpState<scalar_t, kHeadDim> state;
  // The ring belongs to the warp alone: waiting for the copies of its lanes needs no barrier of the block.
#pragma unroll 1
  for (int slice_idx = 0; loader.first_key + slice_idx * kRoundKeys < end; ++slice_idx) {
    ptx::cp_async_wait<kStages - 2>();
    __syncwarp();  // the slice has arrived for every lane, and every lane is done with the one before
    loader.load(slice_idx + kStages - 1);
    const int key_begin = loader.first_key + slice_idx * kRoundKeys;
    const int num_visible[2] = {visible[0] - key_begin, visible[1] - key_begin};
    state.attend(ptx::smem_u32(loader.stage(slice_idx)), r_q, num_visible, scale_log2);
  }
  __syncwarp();  // before the ring, whose slices have all been waited for, is written with results

  float* s_merge = reinterpret_cast<float*>(s_ring);
  constexpr int kWarpStride = kWarpElements / 2;  // floats
  const unsigned not_finite = state.store(s_merge + warp * kWarpStride);
  if (lane == 0) s_again[warp] = not_finite;
  __syncthreads();
  // A masked key weighs 0, but 0 * NaN is NaN: a row that is not finite is done again from the keys that it sees. The
  // last query sees them all.
  unsigned again = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) again |= s_again[i];
  again &= (1u << (s.num_queries - 1)) - 1;
  merge_warps<scalar_t, kHeadDim>(p, s, s_merge, kWarpStride, sequence_idx, head_idx, split_idx, again);
#pragma unroll 1
  for (int row = warp; again >> row != 0; row += kWarps) {
    if ((again >> row & 1u) == 0) continue;
    RowAttention<kHeadDim> exact;
    exact.run(p, query_row<scalar_t>(p, s, head_idx, row), loader.k, loader.v, begin,
              min(end, num_visible_keys(p, s, row)));
    const RowWriter<scalar_t, kHeadDim> writer(p, s, sequence_idx, row, head_idx, split_idx);
    if (writer.g_out != nullptr) {
      exact.store(writer.g_out, reciprocal(exact.denominator));
    } else {
      exact.store(writer.g_partial, 1.0f);
      if (lane == 0) writer.write_stat(exact.maximum, exact.denominator);
    }
  }
}

// Adds up the splits of one query and head, in their order: one warp.
template <typename scalar_t, int kHeadDim>
__global__ void __launch_bounds__(kThreads) paged_attention_combine_kernel(AttentionParams p) {
  ptx::launch_dependents();
  const int lane = threadIdx.x % kWarpSize;
  const int64_t row_idx = blockIdx.x * int64_t{kWarps} + threadIdx.x / kWarpSize;
  if (row_idx >= p.batch_size * p.max_seqlen_q * p.num_heads) return;  // whole warps: no barrier follows
  const int head_idx = static_cast<int>(row_idx % p.num_heads);
  const int query_idx = static_cast<int>(row_idx / p.num_heads % p.max_seqlen_q);
  const int sequence_idx = static_cast<int>(row_idx / p.num_heads / p.max_seqlen_q);
  const Sequence s = load_sequence(p, sequence_idx);
  const Splits splits(p, s.num_keys);
  if (query_idx >= s.num_queries || splits.num == 1) return;  // the only split has written the result
  const int num_splits = ceil_div(s.num_keys, splits.length);
  const float scale_log2 = positive_scale_log2(p);
  const int64_t first = row_idx * p.num_splits;  // partial_idx of split 0
  const float2* g_stat = reinterpret_cast<const float2*>(p.partial_stat) + first;
  const float* g_partial = p.partial_out + first * kHeadDim;

  float maximum = -INFINITY;
  for (int i = 0; i < num_splits; ++i) maximum = fmaxf(maximum, g_stat[i].x);
  float denominator = 0.0f;
  float acc[kHeadDim / kWarpSize] = {};
  for (int i = 0; i < num_splits; ++i) {
    const float weight = rescale(g_stat[i].x, maximum, scale_log2);
    denominator = fmaf(weight, g_stat[i].y, denominator);
#pragma unroll
    for (int j = 0; j < kHeadDim / kWarpSize; ++j) {
      acc[j] = fmaf(weight, g_partial[i * int64_t{kHeadDim} + j * kWarpSize + lane], acc[j]);
    }
  }
  scalar_t* g_out = out_row<scalar_t, kHeadDim>(p, s, head_idx, query_idx);
#pragma unroll
  for (int j = 0; j < kHeadDim / kWarpSize; ++j)
    from_float(acc[j] * reciprocal(denominator), g_out[j * kWarpSize + lane]);
}

int64_t num_combine_blocks(const AttentionParams& p) {
  return p.num_splits > 1 ? ceil_div<int64_t>(p.batch_size * p.max_seqlen_q * p.num_heads, kWarps) : 0;
}

template <typename scalar_t, int kHeadDim>
cudaError_t launch_typed(AttentionParams p, cudaStream_t stream) {
  p.aligned = rows_are_aligned<scalar_t>(p);
  const unsigned num_blocks = static_cast<unsigned>(p.num_splits) * p.num_heads * p.batch_size;
  const cudaError_t error = launch("paged_attention", paged_attention_kernel<scalar_t, kHeadDim>, num_blocks, kThreads,
                                   kSmemBytes<kHeadDim>, stream, p);
  if (error != cudaSuccess || p.num_splits == 1) return error;
  return launch("paged_attention_combine", paged_attention_combine_kernel<scalar_t, kHeadDim>,
                static_cast<unsigned>(num_combine_blocks(p)), kThreads, 0, stream, p);
}

}  // namespace

int64_t paged_attention_num_blocks(const AttentionParams& p) {
  return std::max(int64_t{p.num_splits} * p.num_heads * p.batch_size, num_combine_blocks(p));
}

cudaError_t launch_paged_attention(const AttentionParams& params, cudaStream_t stream) {
  if (params.batch_size == 0 || params.num_heads == 0 || params.max_seqlen_q == 0) return cudaSuccess;
  if (paged_attention_num_blocks(params) > INT32_MAX) return kTooLarge;
  if (params.max_seqlen_q > kPagedMaxQueries) return cudaErrorInvalidValue;
  return dispatch_dtype(params.dtype, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    return dispatch_head_dim(params.head_dim, [&](auto head_dim) {
      if constexpr (std::is_same_v<scalar_t, float>) {
        return cudaErrorInvalidValue;  // the flash kernel's
      } else {
        return launch_typed<scalar_t, decltype(head_dim)::value>(params, stream);
      }
    });
  });
}

}  // namespace persimmon_fast::cuda
