// The head product x W^T, reduced tile by tile of the vocabulary where it is made. See lm_head.cu.
#pragma once

#include <driver_types.h>

#include <cstdint>

#include "csrc/common/dtype.h"
#include "csrc/common/vocab_ranges.h"

namespace persimmon_fast::cuda {

constexpr int kVocabTile = 128;  // tokens of one tile: whose statistics are kept, which sampling skips together
constexpr int64_t num_vocab_tiles(int64_t vocab_size) { return (vocab_size + kVocabTile - 1) / kVocabTile; }

// Maximum, its lowest token and the softmax denominator of each tile of each row: [num_rows, num_tiles] each.
// A NaN logit is the maximum of its tile, the first one.
struct TileStats {
  float* max;
  float* sum;  // of exp(logit - max); 0 where max is -inf
  int32_t* token;
};

struct LmHeadParams {
  const void* x;       // [num_rows, hidden_size], rows x_row_stride elements apart
  const void* weight;  // [vocab_size, hidden_size]
  int64_t x_row_stride;
  int64_t weight_row_stride;
  int64_t num_rows;
  int64_t vocab_size;
  int64_t hidden_size;
  TileStats tiles;
  float* logits;  // [num_rows, num_vocab_tiles(vocab_size) * kVocabTile], -inf beyond vocab_size; or null: not kept
  const int64_t* target_ids;  // [num_rows] tokens whose logit goes to `target`; or null
  float* target;              // [num_rows], not written where target_ids holds no token of a computed tile
  VocabRanges ranges;         // tiles outside are not computed, tokens outside have a logit of -inf
  int num_multiprocessors;
  DType dtype;  // of x and weight
};

struct LmHeadMergeParams {
  TileStats tiles;
  int64_t num_rows;
  int64_t vocab_size;
  const int64_t* target_ids;  // with target: log-probabilities of these tokens, NaN where there is no such token
  const float* target;        // null: of the most likely tokens
  VocabRanges ranges;         // as of lm_head: tokens outside have probability 0
  int64_t* token_ids;         // [num_rows] the most likely tokens; or null
  float* logprobs;            // [num_rows]
};

// Enqueue on `stream`; neither allocate nor synchronise. vocab_size below 2^31 - kVocabTile; num_rows may be 0.
cudaError_t launch_lm_head(const LmHeadParams& params, cudaStream_t stream);
cudaError_t launch_lm_head_merge(const LmHeadMergeParams& params, cudaStream_t stream);

}  // namespace persimmon_fast::cuda
