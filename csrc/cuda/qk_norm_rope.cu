// qk_norm_rope_kernel: out[t, h] = rope(LayerNorm(x[t, h]), position_ids[t]) for x = q and x = k
//
// Tile      one (token, head) = kLanes neighbouring lanes (norm_rope.cuh), which do q, then k with the same cosines and
//           sines; both are loaded first: 64 bytes in flight per thread. 128 threads: 32 items of 16-bit heads of 64
// Traffic   q and k read once, written once; weights, cos_sin and position_ids are served by L1 and L2
// Bound     memory: about 10 flops per element of 4 (16-bit) or 8 bytes moved
// Resources ptxas -v, registers per thread (sm_80; sm_90a), no spills and no stack on 8.0, 8.6, 8.9, 9.0a: aligned
//           16-bit 64; 64 (8 blocks, 1024 threads per multiprocessor), fp32 42; 42; unaligned 16-bit 56; 56, fp32
//           42; 42; column by column 32; 40. No shared memory
// Numerics  fp32 statistics and rotary, one rounding (norm_rope.cuh). The bits of a head depend neither on the other
//           heads nor on alignment or strides
// Requires  head_dim 64 or 128; 16-byte accesses where every vector is aligned and rotary_dim / 2 is whole vectors. An
//           output may be its own input: a lane reads what it will write, and nothing else, before it writes
// Measured  not run on a GPU yet
// Source    Su et al. 2021, RoFormer, arXiv:2104.09864 (rotary embedding, half-split pairs as in GPT-NeoX);
//           Ba et al. 2016, Layer Normalization, arXiv:1607.06450; kernel written for this project
#include "csrc/cuda/qk_norm_rope.h"

#include "csrc/cuda/dispatch.h"
#include "csrc/cuda/norm_rope.cuh"

namespace persimmon_fast::cuda {
namespace {

constexpr int kThreads = 128;

// kVec: columns per vector. kAligned: of 16 bytes, and all of them aligned.
template <typename scalar_t, int kHeadDim, int kVec, bool kAligned>
__global__ void __launch_bounds__(kThreads) qk_norm_rope_kernel(QkNormRopeParams p) {
  constexpr int kLanes = HeadLayout<kHeadDim, kVec>::kLanes;
  const int half_rotary_dim = static_cast<int>(p.head.rotary_dim) / 2;
  const unsigned num_heads = static_cast<unsigned>(p.head.num_heads);
  const unsigned num_items = static_cast<unsigned>(p.head.num_tokens) * num_heads;
  const unsigned item = blockIdx.x * (kThreads / kLanes) + threadIdx.x / kLanes;
  // Lanes past the end take part in the shuffles, with numbers that go nowhere.
  const bool is_active = item < num_items;
  const int64_t token = is_active ? item / num_heads : 0;
  const int64_t head_idx = is_active ? item % num_heads : 0;

  // First, so that the second of its two steps through memory overlaps with the heads' one.
  const float* cos_sin = cos_sin_row(p.head, token);
  HeadValues<kHeadDim, kVec> q = {};
  HeadValues<kHeadDim, kVec> k = {};
  if (is_active) {
    const scalar_t* g_q = static_cast<const scalar_t*>(p.q) + token * p.q_token_stride + head_idx * p.q_head_stride;
    const scalar_t* g_k = static_cast<const scalar_t*>(p.k) + token * p.k_token_stride + head_idx * p.k_head_stride;
    load_head<kAligned>(g_q, half_rotary_dim, q);
    load_head<kAligned>(g_k, half_rotary_dim, k);
  }
  norm_rope_head<scalar_t, kAligned>(q, p.head, p.head.q_norm, head_idx, cos_sin);
  norm_rope_head<scalar_t, kAligned>(k, p.head, p.head.k_norm, head_idx, cos_sin);
  if (is_active) {
    scalar_t* g_q = static_cast<scalar_t*>(p.q_out) + token * p.q_out_token_stride + head_idx * p.q_out_head_stride;
    scalar_t* g_k = static_cast<scalar_t*>(p.k_out) + token * p.k_out_token_stride + head_idx * p.k_out_head_stride;
    store_head<kAligned>(g_q, half_rotary_dim, q);
    store_head<kAligned>(g_k, half_rotary_dim, k);
  }
}

template <typename scalar_t, int kHeadDim, int kVec, bool kAligned>
cudaError_t launch_kernel(const QkNormRopeParams& p, cudaStream_t stream) {
  constexpr int64_t kItems = kThreads / HeadLayout<kHeadDim, kVec>::kLanes;
  const int64_t num_blocks = ceil_div(p.head.num_tokens * p.head.num_heads, kItems);
  return launch("qk_norm_rope", qk_norm_rope_kernel<scalar_t, kHeadDim, kVec, kAligned>,
                static_cast<unsigned>(num_blocks), kThreads, 0, stream, p);
}

template <typename scalar_t, int kHeadDim>
cudaError_t launch_typed(const QkNormRopeParams& p, cudaStream_t stream) {
  constexpr int kVec = Chunk<scalar_t>::kSize;
  if (!has_whole_vectors<scalar_t>(p.head)) return launch_kernel<scalar_t, kHeadDim, 1, false>(p, stream);
  bool aligned = is_aligned(p.head) && is_aligned(p.q) && is_aligned(p.k) && is_aligned(p.q_out) && is_aligned(p.k_out);
  for (const int64_t stride : {p.q_token_stride, p.q_head_stride, p.k_token_stride, p.k_head_stride,
                               p.q_out_token_stride, p.q_out_head_stride, p.k_out_token_stride, p.k_out_head_stride}) {
    aligned = aligned && stride % kVec == 0;
  }
  return aligned ? launch_kernel<scalar_t, kHeadDim, kVec, true>(p, stream)
                 : launch_kernel<scalar_t, kHeadDim, kVec, false>(p, stream);
}

}  // namespace

cudaError_t launch_qk_norm_rope(const QkNormRopeParams& params, cudaStream_t stream) {
  if (params.head.num_tokens == 0 || params.head.num_heads == 0) return cudaSuccess;
  // Items are 32-bit inside the kernel. 2^31 heads of q and k are half a terabyte and more.
  if (params.head.num_tokens > INT32_MAX / params.head.num_heads) return kTooLarge;
  return dispatch_dtype(params.head.dtype, [&](auto scalar) {
    return dispatch_head_dim(params.head.head_dim, [&](auto head_dim) {
      return launch_typed<decltype(scalar), decltype(head_dim)::value>(params, stream);
    });
  });
}

}  // namespace persimmon_fast::cuda
