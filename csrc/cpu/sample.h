// One token of each row of logits, drawn from its filtered distribution. See sample.cpp.
#pragma once

#include <cstdint>

#include "csrc/cpu/isa.h"

namespace persimmon_fast::cpu {

constexpr int64_t kSampleGroup = 64;  // tokens that are skipped together, and share 16 blocks of Philox
constexpr int64_t num_sample_groups(int64_t vocab_size) { return (vocab_size + kSampleGroup - 1) / kSampleGroup; }

struct SampleParams {
  const float* logits;  // [num_rows, vocab_size], rows logits_row_stride floats apart
  int64_t logits_row_stride;
  int64_t vocab_size;
  const int64_t* argmax;       // [num_rows] of the bare logits
  const bool* finite;          // [num_rows] no NaN and no inf; other rows take their argmax
  const float* temperature;    // [num_rows], 0: the most likely token
  const int32_t* top_k;        // [num_rows], 0: off
  const float* top_p;          // [num_rows], 1: off
  const float* min_p;          // [num_rows], 0: off
  const int64_t* seeds;        // [num_rows]
  const int64_t* offsets;      // [num_rows]
  const int64_t* penalty_ids;  // [num_rows, num_penalised], negative: padding; null: none
  int64_t penalty_row_stride;
  int64_t num_penalised;
  const float* repetition_penalty;  // [num_rows]
  int64_t* token_ids;               // [num_rows]
  // Scratch of the calling thread:
  float* scaled;     // [num_sample_groups(vocab_size) * kSampleGroup] z
  float* group_max;  // [num_sample_groups(vocab_size)]
  float* selection;  // [vocab_size] values that are being sorted
};

// Work items: rows.
PF_CPU_KERNEL(sample, SampleParams)

}  // namespace persimmon_fast::cpu
