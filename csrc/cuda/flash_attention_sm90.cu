// flash_attention_sm90_kernel: flash_attention (see flash_attention.cu) in 16-bit types on wgmma and TMA
//
// Tile      one block = 192 queries (head_dim 64) or 128 (128) of one head and sequence: 3 or 2 warpgroups x 64. Keys
//           in tiles of 128. Scores, weights and sums in registers, queries in shared memory. One block per
//           multiprocessor, which goes from item to item
//
//             warps of the last warpgroup   keys | queries | values, each by TMA, ahead into the next items
//             other warpgroups              s = q k^T, softmax, sums += w v
//
// Schedule  per warpgroup, j: tiles of keys. The product of the next tile is issued together with the sums of the last
//           one, and the latter run while the scores of the former become weights:
//
//             tensor cores   q k(j+1)^T   w(j) v(j)   ..........   q k(j+2)^T   w(j+1) v(j+1)
//             the others     ..........   softmax(j+1) ........   ..........   softmax(j+2) ...
//
//           The warpgroups take turns to issue (Turn): in the gaps of one run the products of the others. Items: tiles
//           of queries from every sequence's end on, heaviest first, every other round backwards. Masked are tiles of
//           keys that cross the diagonal or the end
// Barriers  k_full, v_full[stage]     the tile's bytes have arrived (1 arrival and the bytes)
//           k_empty, v_empty[stage]   every warp that multiplies has done so (4 arrivals per warpgroup)
//           q_full, q_empty[group]    the same for a warpgroup's queries
//           v_end                     the bytes of a tile that reaches behind its sequence have arrived: the warp that
//                                     loads values sets those rows to zero before it passes v_full on
// Traffic   q read and out, lse written once; k and v read once per 192 or 128 queries, mostly from L2
// Bound     clocks per 64 x 128 tile, counted in the machine code (docs/kernels/flash_attention_sm90.md): head_dim 64:
//           tensor cores 512, exp2 512, instructions 422, shared memory 405. 128: 1024, 512, 433, 896
// Resources 128 and 168 registers at launch, then 160 and 232 where products run, 32 and 40 where tiles are loaded; no
//           spills, no stack. Shared memory 120 KiB + 152 bytes and 224 KiB + 136 bytes
// Numerics  as flash_attention.cu, sums over keys in ascending steps of 16. Where both kernels take the tensors, the
//           same accuracy, not the same bits
// Requires  flash_attention_sm90_takes(): 16-bit types, rows that TMA can address, softmax_scale >= 0, pages of a power
//           of two of at least 8 keys
// Measured  not run on a GPU yet
// Source    Shah et al. 2024, FlashAttention-3, arXiv:2407.08608 (warpgroups that load and that multiply, turns, the
//           softmax beside the products); FlashAttention-4 (rescaling beyond a threshold); written for this project
#include "csrc/cuda/flash_attention_sm90.h"

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "csrc/cuda/dispatch.h"
#include "csrc/cuda/flash_attention_sm90_load.cuh"
#include "csrc/cuda/flash_attention_sm90_multiply.cuh"

namespace persimmon_fast::cuda {
namespace {

using namespace flash_sm90;

template <typename scalar_t, int kHeadDim>
__global__ void __launch_bounds__(Shape<kHeadDim>::kThreads, 1)
    flash_attention_sm90_kernel(const __grid_constant__ Params params) {
#ifdef PF_SM90A
  using S = Shape<kHeadDim>;
  SMEM_CARVER(carver);
  Smem<kHeadDim> smem;
  smem.q = ptx::smem_u32(carver.take<unsigned char>(S::kGroups * S::kQueryBytes, 1024));
  smem.k = ptx::smem_u32(carver.take<unsigned char>(kStages * S::kTileBytes, 1024));
  unsigned char* s_values = carver.take<unsigned char>(kStages * S::kTileBytes, 1024);
  smem.v = ptx::smem_u32(s_values);
  smem.barriers = ptx::smem_u32(carver.take<uint64_t>(S::kBarriers));
  if (threadIdx.x == 0) {
    for (const CUtensorMap* map : {&params.q, &params.k, &params.v}) ptx::prefetch_tensor_map(map);
    smem.init_barriers();
  }
  __syncthreads();

  const int group = uniform(static_cast<int>(threadIdx.x) / kGroupThreads);
  if (group == S::kGroups) {
    ptx::decrease_registers<S::kLoadRegisters>();
    const Loader<kHeadDim> loader{params, smem, static_cast<int>(threadIdx.x) % kWarpSize};
    switch (threadIdx.x / kWarpSize % kGroupWarps) {
      case 0:
        return loader.load_keys();
      case 1:
        return loader.load_queries();
      case 2:
        return loader.load_values(s_values);
    }
  } else {
    ptx::increase_registers<S::kMultiplyRegisters>();
    Multiplier<scalar_t, kHeadDim> multiplier(params, smem, group);
    for_rounds(params, [&](unsigned round) { multiplier.run(round); });
    if (group == 0) multiplier.turn.take();  // the token that is on its way
  }
#else
  __trap();  // an error where the driver was made to run the PTX of another architecture
#endif
}

// Boxes of `rows` tokens, or slots of a page, of one head, 64 dims wide.
TensorBox token_box(const AttentionParams& p, const void* base, int64_t tokens, int64_t token_stride,
                    int64_t head_stride, int rows) {
  return {base, 3, {p.head_dim, p.num_heads, tokens}, {1, head_stride, token_stride}, {64, 1, rows}};
}
TensorBox key_box(const AttentionParams& p, const void* base, int64_t token_stride, int64_t head_stride) {
  if (p.page_table == nullptr) return token_box(p, base, p.total_k, token_stride, head_stride, kBlockN);
  return {base,
          4,
          {p.head_dim, p.page_size, p.num_heads, p.total_k},
          {1, token_stride, head_stride, p.page_stride},
          {64, std::min(p.page_size, kBlockN), 1, 1}};
}
struct Boxes {
  TensorBox q;
  TensorBox k;
  TensorBox v;

  explicit Boxes(const AttentionParams& p)
      : q(token_box(p, p.q, p.total_q, p.q_token_stride, p.q_head_stride, kGroupRows)),
        k(key_box(p, p.k, p.k_token_stride, p.k_head_stride)),
        v(key_box(p, p.v, p.v_token_stride, p.v_head_stride)) {}
};

template <typename scalar_t, int kHeadDim>
cudaError_t launch_typed(const AttentionParams& p, cudaStream_t stream) {
  Params params{};
  const Boxes boxes(p);
  cudaError_t error = encode_tensor_map(boxes.q, params.q);
  if (error == cudaSuccess) error = encode_tensor_map(boxes.k, params.k);
  if (error == cudaSuccess) error = encode_tensor_map(boxes.v, params.v);
  if (error != cudaSuccess) return error;
  params.attention = p;
  params.scale_log2 = positive_scale_log2(p);
  params.slack = maximum_slack(params.scale_log2);
  params.box_rows = boxes.k.box[p.page_table == nullptr ? 2 : 1];
  while (p.page_size >> (params.page_shift + 1) != 0) ++params.page_shift;
  // The last tiles of queries of all heads and sequences, those before them, and so on.
  const unsigned num_tiles = static_cast<unsigned>(ceil_div<int64_t>(p.max_seqlen_q, Shape<kHeadDim>::kBlockM));
  const unsigned num_items = num_tiles * p.num_heads * p.batch_size;
  const unsigned num_blocks = std::min<unsigned>(num_items, p.num_multiprocessors);
  params.num_rounds = ceil_div(num_items, num_blocks);
  return launch("flash_attention_sm90", flash_attention_sm90_kernel<scalar_t, kHeadDim>, num_blocks,
                Shape<kHeadDim>::kThreads, Shape<kHeadDim>::kSmemBytes, stream, params);
}

}  // namespace

bool flash_attention_sm90_takes(const AttentionParams& p) {
  if (p.dtype == DType::kFloat32 || !(p.softmax_scale >= 0.0f) || !is_aligned(p.out)) return false;
  // Pages are whole tiles, or parts of one that begin where the swizzle does: at a multiple of 8 rows.
  const bool is_power_of_two = (p.page_size & (p.page_size - 1)) == 0;
  if (p.page_table != nullptr && !(is_power_of_two && p.page_size >= 8)) return false;
  const Boxes boxes(p);
  return is_encodable(boxes.q) && is_encodable(boxes.k) && is_encodable(boxes.v);
}

cudaError_t launch_flash_attention_sm90(const AttentionParams& params, cudaStream_t stream) {
  return dispatch_dtype(params.dtype, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    return dispatch_head_dim(params.head_dim, [&](auto head_dim) {
      if constexpr (std::is_same_v<scalar_t, float>) {
        return cudaErrorInvalidValue;
      } else {
        return launch_typed<scalar_t, decltype(head_dim)::value>(params, stream);
      }
    });
  });
}

}  // namespace persimmon_fast::cuda
