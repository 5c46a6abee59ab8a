// One token of each row of logits, drawn from its filtered distribution. See sample.cu.
#pragma once

#include <driver_types.h>

#include <cstdint>

#include "csrc/cuda/lm_head.h"

namespace persimmon_fast::cuda {

// Top-p finds its last token digit by digit of the distance between order keys, from the largest logit down.
constexpr int kNucleusLevels = 3;
constexpr int kNucleusBins = 2048;
constexpr int64_t kMaxSampleVocab = int64_t{1} << 24;  // beyond it the fixed-point sums of top-p could overflow

// Tiles of one block of the passes that several blocks share.
constexpr int kTilesPerBlock = 32;
constexpr int64_t num_draw_blocks(int64_t vocab_size) {
  return (num_vocab_tiles(vocab_size) + kTilesPerBlock - 1) / kTilesPerBlock;
}

// A sum of probabilities relative to the most likely token, exact: high * 2^-39 + low * 2^-78.
struct FixedMass {
  unsigned long long high;
  unsigned long long low;
};

// Where the nucleus ends, as far as the levels before know.
struct NucleusState {
  FixedMass above;  // of the tokens nearer to the best than `begin`
  FixedMass total;  // of all tokens that top-k left
  uint32_t begin;   // distance of order keys from that of the best z
};

enum class SampleMode : int32_t {
  kDecided,  // `token` is the result
  kDraw,     // to be drawn from z >= threshold
  kNucleus,  // likewise, after top-p
};

// What the kernels tell each other about a row.
struct SampleRow {
  double sum;          // of exp(logit - max), bare logits
  double first_score;  // of `token`
  float max;           // bare logit
  float divisor;       // temperature
  float best;          // largest z
  float top_k_threshold;
  float min_p_threshold;
  int32_t token;  // has z = best
  SampleMode mode;
  NucleusState nucleus[kNucleusLevels];  // before level i; [0] is not used
};

struct SampleParams {
  TileStats tiles;  // of lm_head; max is changed to that of the penalised logits
  float* logits;    // of lm_head; penalised in place
  int64_t num_rows;
  int64_t vocab_size;
  const float* temperature;    // [num_rows], 0: the most likely token
  const int32_t* top_k;        // [num_rows], 0: off
  const float* top_p;          // [num_rows], 1: off
  const float* min_p;          // [num_rows], 0: off
  const int64_t* seeds;        // [num_rows]
  const int64_t* offsets;      // [num_rows]
  const int64_t* penalty_ids;  // [num_rows, num_penalised]; what is no token is padding; null: none
  int64_t penalty_row_stride;
  int64_t num_penalised;
  const float* repetition_penalty;  // [num_rows]
  // Scratch:
  SampleRow* rows;            // [num_rows]
  FixedMass* mass;            // [num_rows, kNucleusLevels, kNucleusBins]
  float* bare_logits;         // [num_rows, num_penalised] of the penalised tokens
  double* candidate_scores;   // [num_rows, num_draw_blocks]
  int32_t* candidate_tokens;  // [num_rows, num_draw_blocks]
  // Results:
  int64_t* token_ids;  // [num_rows]
  float* logprobs;     // [num_rows] under the bare logits
};

// Enqueues on `stream`; neither allocates nor synchronises. vocab_size <= kMaxSampleVocab, num_rows below 2^16.
cudaError_t launch_sample(const SampleParams& params, cudaStream_t stream);

}  // namespace persimmon_fast::cuda
