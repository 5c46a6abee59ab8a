// The part of the vocabulary that a head computes: a few ranges of tokens, all others count as impossible.
#pragma once

#include <cstdint>

namespace persimmon_fast {

constexpr int kMaxVocabRanges = 16;  // of one call: they travel in the arguments of a CUDA kernel

// Tokens begin[i] .. end[i] - 1 of every range i < count, ascending, none empty, none overlapping; count 0: all tokens.
struct VocabRanges {
  int32_t count;
  int32_t begin[kMaxVocabRanges];
  int32_t end[kMaxVocabRanges];
};

}  // namespace persimmon_fast
