// logit_stats: max, argmax and sum exp(logit - max) of a block of the vocabulary      transpose_logits: out = in^T
//
// Work      one row of one block (a few thousand tokens, in cache): a pass for the maximum, one for the sum, and a scan
//           for the first token that has the maximum
// Traffic   none to memory: the product has just written the block
// Numerics  sums in fp32 per lane within a block, blocks in fp64; NaN wins over every number, as in torch.argmax
#include "csrc/cpu/lm_head.h"

#include <algorithm>
#include <limits>

#include "csrc/cpu/transpose.h"
#include "csrc/cpu/vec.h"

namespace persimmon_fast::cpu::PF_ISA {
namespace {

constexpr int kW = Vec::kWidth;
constexpr float kMinusInf = -std::numeric_limits<float>::infinity();

LogitStats row_stats(const float* logits, int64_t n, int64_t first_token) {
  // max(a, b) is b where either is NaN: the running maximum stands second and never becomes NaN.
  Vec lanes = Vec::set1(kMinusInf);
  int64_t i = 0;
  for (; i + kW <= n; i += kW) lanes = max(load(logits + i), lanes);
  float best = reduce_max(lanes);
  for (; i < n; ++i) best = logits[i] > best ? logits[i] : best;

  const Vec shift = Vec::set1(best == kMinusInf ? 0.0f : best);
  Vec sums = Vec::zero();
  for (i = 0; i + kW <= n; i += kW) sums = sums + exp(load(logits + i) - shift);
  float sum = reduce_add(sums);
  for (; i < n; ++i) sum += std::exp(logits[i] - (best == kMinusInf ? 0.0f : best));

  if (std::isnan(sum)) {  // a NaN logit, or inf - inf
    const float* nan = std::find_if(logits, logits + n, [](float x) { return std::isnan(x); });
    if (nan != logits + n) return {*nan, sum, first_token + (nan - logits)};
  }
  return {best, sum, first_token + (std::find(logits, logits + n, best) - logits)};
}

}  // namespace

void logit_stats(const LogitStatsParams& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    p.stats[row * p.stats_stride] = row_stats(p.logits + row * p.row_stride, p.num_tokens, p.first_token);
  }
}

void transpose_logits(const TransposeParams& p, int64_t begin, int64_t end) {
  for (int64_t row = 0; row < p.num_rows; row += kW) {
    for (int64_t column = begin; column < end; column += kW) {
      const float* in = p.in + row * p.in_stride + column;
      float* out = p.out + column * p.out_stride + row;
      if (row + kW <= p.num_rows && column + kW <= end) {
        Vec block[kW];
        for (int i = 0; i < kW; ++i) block[i] = load(in + i * p.in_stride);
        transpose(block);
        for (int i = 0; i < kW; ++i) store(out + i * p.out_stride, block[i]);
      } else {
        for (int64_t j = 0; j < std::min<int64_t>(kW, end - column); ++j) {
          for (int64_t i = 0; i < std::min<int64_t>(kW, p.num_rows - row); ++i) {
            out[j * p.out_stride + i] = in[i * p.in_stride + j];
          }
        }
      }
    }
  }
}

}  // namespace persimmon_fast::cpu::PF_ISA
