// Reductions over blocks of fp32 logits, where they are made. See lm_head.cpp.
#pragma once

#include <cmath>
#include <cstdint>

#include "csrc/cpu/isa.h"

namespace persimmon_fast::cpu {

// Maximum, its lowest token and the softmax denominator of some logits of one row. A NaN logit wins, the first one.
struct LogitStats {
  float max;
  double sum;  // of exp(logit - max)
  int64_t argmax;
};

struct LogitStatsParams {
  const float* logits;  // [num_rows, num_tokens] of one block of the vocabulary, rows row_stride floats apart
  int64_t row_stride;
  int64_t first_token;  // id of the block's first token
  int64_t num_tokens;   // of the block
  LogitStats* stats;    // one per row, stats_stride apart
  int64_t stats_stride;
};

// Work items: rows.
PF_CPU_KERNEL(logit_stats, LogitStatsParams)

struct TransposeParams {
  const float* in;  // [num_rows, num_columns], rows in_stride floats apart
  int64_t in_stride;
  float* out;  // [num_columns, num_rows], rows out_stride floats apart
  int64_t out_stride;
  int64_t num_rows;
};

// Work items: columns of in.
PF_CPU_KERNEL(transpose_logits, TransposeParams)

// Merges the stats of the blocks of one row in order, so that the result does not depend on who computed which.
inline LogitStats merge_stats(const LogitStats* blocks, int64_t num_blocks) {
  LogitStats merged = blocks[0];
  for (int64_t b = 1; b < num_blocks && !std::isnan(merged.max); ++b) {
    if (blocks[b].max > merged.max || std::isnan(blocks[b].max)) merged = blocks[b];
  }
  if (std::isinf(merged.max) || std::isnan(merged.max)) {
    merged.sum = std::nan("");  // as log_softmax: inf - inf
    return merged;
  }
  merged.sum = 0.0;
  for (int64_t b = 0; b < num_blocks; ++b) {
    merged.sum += blocks[b].sum * std::exp(static_cast<double>(blocks[b].max) - merged.max);
  }
  return merged;
}

// Natural logarithm of the probability of a token with this logit.
inline float logprob(const LogitStats& stats, float logit) {
  return static_cast<float>(static_cast<double>(logit) - stats.max - std::log(stats.sum));
}

}  // namespace persimmon_fast::cpu
