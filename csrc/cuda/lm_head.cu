// lm_head: logits = x W^T in fp32, reduced per row and tile of 128 tokens where they are made
// lm_head_merge: the tiles of a row -> most likely token, log-probability
//
// Tile      gemm.cuh, up to 16 rows stream.cuh; the epilogue gives a row's 128 tokens to 16 neighbouring lanes, 8 each.
//           One block of 256 threads merges a row
// Traffic   weight once per 128 rows (2.1 GB for Persimmon-8B in 16 bits), 12 bytes of statistics per row and tile; the
//           logits only where sampling asks for them (1 MB a row). Tiles outside of the ranges: 12 bytes and logits
// Bound     memory up to about 150 rows, then tensor cores
// Resources ptxas -v, registers per thread (sm_80; sm_90a), no spills on 8.0, 8.6, 8.9, 9.0a: 64 x 128 tile 164; 168,
//           128 x 128 242; 242, unaligned 170; 176, fp32 117; 119, up to 16 rows 113; 125, in fp32 93; 124, merge
//           34; 38. Shared, but for that of stream.cuh: 48, 64, 48, 32, 1 KB
// Numerics  fp32 sums over k and within a tile, fp64 over tiles, all in an order that depends on the row alone: the
//           bits change neither with num_rows (up to 16, or above) nor from run to run. The first NaN wins, as in
//           torch.argmax; equal logits: the lowest token. exp by expf
// Measured  not run on a GPU yet
// Source    online softmax: Milakov and Gimelshein 2018, arXiv:1805.02867; logits that stay on the chip: Wijmans et al.
//           2024, Cut your losses in large-vocabulary language models, arXiv:2411.09009; written for this project
#include "csrc/cuda/lm_head.h"

#include "csrc/cuda/dispatch.h"
#include "csrc/cuda/lm_head_stats.cuh"
#include "csrc/cuda/stream.cuh"

namespace persimmon_fast::cuda {
namespace {

constexpr int kMergeThreads = 256;

struct LmHeadEpilogue {
  TileStats tiles;
  int64_t num_tiles;
  float* logits;
  const int64_t* target_ids;
  float* target;
  int64_t vocab_size;
  VocabRanges ranges;

  DEV bool skips(int64_t col0) const { return !holds<false>(ranges, col0, min(col0 + kVocabTile, vocab_size)); }

  // As a tile of logits that are all -inf, but never the most likely.
  DEV void skip(int64_t row0, int64_t col0, int rows) const {
    const int64_t vocab_tile = col0 / kVocabTile;
    for (int row = threadIdx.x; row < rows; row += blockDim.x) {
      const int64_t place = (row0 + row) * num_tiles + vocab_tile;
      tiles.max[place] = -INFINITY;
      tiles.sum[place] = 0.0f;
      tiles.token[place] = INT32_MAX;
    }
    if (logits == nullptr) return;
    for (int i = threadIdx.x; i < rows * kVocabTile; i += blockDim.x) {
      const int64_t row = row0 + i / kVocabTile;
      logits[(row * num_tiles + vocab_tile) * kVocabTile + i % kVocabTile] = -INFINITY;
    }
  }

  template <typename Tile>
  DEV void operator()(const Tile& tile) const {
    static_assert(Tile::kCols == kVocabTile, "one row segment is one tile of the statistics");
    constexpr int kLanes = Tile::kLanesPerRow;
    const int64_t vocab_tile = tile.col0 / kVocabTile;
    const int lane = threadIdx.x % kWarpSize;
    const int col = lane % kLanes * kPiece;
    const int n = max(0, min(tile.cols - col, kPiece));
    const bool whole = holds<true>(ranges, tile.col0, tile.col0 + tile.cols);
    // In place of for_pieces, whose loop would go on over the rows that do not exist: with one row, 63 of 64.
#pragma unroll 1
    for (int first = threadIdx.x / kWarpSize * kWarpSize / kLanes; first < tile.rows;
         first += Tile::kThreads / kLanes) {
      const int row = first + lane / kLanes;
      float values[kPiece];
      tile.load_piece(row, col, values);
      const uint32_t token = static_cast<uint32_t>(tile.col0) + col;
      uint32_t kept = (1u << n) - 1;
      if (!whole) {
#pragma unroll
        for (int i = 0; i < kPiece; ++i) {
          if (holds<true>(ranges, int64_t{token} + i, int64_t{token} + i + 1)) continue;
          kept &= ~(1u << i);
          values[i] = -INFINITY;
        }
      }
      u64 best = 0;
#pragma unroll
      for (int i = 0; i < kPiece; ++i) {
        const u64 candidate = pack_best(values[i], token + i);
        if ((kept >> i & 1) != 0 && candidate > best) best = candidate;
      }
      best = reduce_lanes<kLanes>(best, [](u64 a, u64 b) { return a > b ? a : b; });
      const float max_logit = from_order_key(packed_key(best));
      const float shift = max_logit == -INFINITY ? 0.0f : max_logit;
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < kPiece; ++i) {
        if (i < n) sum += expf(values[i] - shift);
      }
      sum = sum_lanes<kLanes>(sum);
      if (row >= tile.rows) continue;

      const int64_t row_idx = tile.row0 + row;
      if (col == 0) {
        const int64_t place = row_idx * num_tiles + vocab_tile;
        tiles.max[place] = max_logit;
        tiles.sum[place] = sum;
        tiles.token[place] = static_cast<int32_t>(packed_token(best));
      }
      if (logits != nullptr) {  // whole tiles: sampling reads -inf where the vocabulary has ended
        float* g_piece = logits + (row_idx * num_tiles + vocab_tile) * kVocabTile + col;
        float padded[kPiece];
#pragma unroll
        for (int i = 0; i < kPiece; ++i) padded[i] = i < n ? values[i] : -INFINITY;
        write_piece(g_piece, kPiece, true, padded);
      }
      if (target_ids != nullptr) {
        const int64_t place = target_ids[row_idx] - token;
        if (place >= 0 && place < n) target[row_idx] = tile.at(row, col + static_cast<int>(place));
      }
    }
  }
};

template <typename scalar_t>
cudaError_t launch_typed(const LmHeadParams& p, cudaStream_t stream) {
  const GemmOperands operands{p.x,           p.weight,       p.num_rows,         p.vocab_size,
                              p.hidden_size, p.x_row_stride, p.weight_row_stride};
  const LmHeadEpilogue epilogue{p.tiles, num_vocab_tiles(p.vocab_size), p.logits, p.target_ids, p.target, p.vocab_size,
                                p.ranges};
  return launch_product<scalar_t, kVocabTile, kVocabTile>("lm_head", operands, StreamNorm{}, epilogue,
                                                          p.num_multiprocessors, stream);
}

__global__ void __launch_bounds__(kMergeThreads, 4) lm_head_merge_kernel(LmHeadMergeParams p) {
  const int64_t row = blockIdx.x;
  const RowStats stats = merge_tiles<kMergeThreads>(p.tiles, row, static_cast<int>(num_vocab_tiles(p.vocab_size)));
  if (threadIdx.x != 0) return;
  if (p.token_ids != nullptr) p.token_ids[row] = stats.token;
  float logit = stats.max;
  if (p.target != nullptr) {
    const int64_t token = p.target_ids[row];
    logit = token < 0 || token >= p.vocab_size        ? NAN
            : holds<true>(p.ranges, token, token + 1) ? p.target[row]
                                                      : -INFINITY;
  }
  p.logprobs[row] = logprob(logit, stats.max, stats.sum);
}

}  // namespace

cudaError_t launch_lm_head(const LmHeadParams& params, cudaStream_t stream) {
  if (params.vocab_size > INT32_MAX - kVocabTile) return kTooLarge;
  return dispatch_dtype(params.dtype, [&](auto scalar) { return launch_typed<decltype(scalar)>(params, stream); });
}

cudaError_t launch_lm_head_merge(const LmHeadMergeParams& params, cudaStream_t stream) {
  if (params.num_rows == 0) return cudaSuccess;
  if (params.num_rows > INT32_MAX) return kTooLarge;
  return launch("lm_head_merge", lm_head_merge_kernel, static_cast<unsigned>(params.num_rows), kMergeThreads, 0, stream,
                params);
}

}  // namespace persimmon_fast::cuda
