// lm_head_argmax, lm_head_logprobs, lm_head_sample of every device: checks, empty outputs (which is all of the Meta
// kernels).
#pragma once

#include <tuple>

#include "csrc/common/vocab_ranges.h"
#include "csrc/ops/checks.h"

namespace persimmon_fast {

inline void check_head(const char* op, const at::Tensor& x, const at::Tensor& weight) {
  check_float(op, "x", x);
  TORCH_CHECK_VALUE(x.dim() == 2, op, ": x must be [num_rows, hidden_size], got ", x.sym_sizes());
  TORCH_CHECK_VALUE(x.sym_size(1) > 0, op, ": x must have hidden_size > 0, got ", x.sym_sizes());
  check_dense_rows(op, "x", x);
  check_same(op, "weight", weight, "x", x);
  check_shape(op, "weight", weight, {-1, x.sym_size(1)}, "[vocab_size, hidden_size]");
  TORCH_CHECK_VALUE(weight.sym_size(0) > 0, op, ": weight must have vocab_size > 0, got ", weight.sym_sizes());
  check_dense_rows(op, "weight", weight);
}

// Pairs of begin and end, one after the other; none: every token.
using OptionalRanges = at::OptionalIntArrayRef;

inline void check_vocab_ranges(const char* op, const OptionalRanges& ranges, const at::Tensor& weight) {
  if (!ranges.has_value()) return;
  TORCH_CHECK_VALUE(ranges->size() % 2 == 0 && !ranges->empty() && ranges->size() <= 2 * kMaxVocabRanges, op,
                    ": vocab_ranges must be 1 to ", kMaxVocabRanges, " pairs of begin and end, got ", ranges->size(),
                    " numbers");
  int64_t previous = 0;
  for (size_t i = 0; i < ranges->size(); i += 2) {
    const int64_t begin = (*ranges)[i];
    const int64_t end = (*ranges)[i + 1];
    TORCH_CHECK_VALUE(previous <= begin && begin < end && end <= weight.sym_size(0), op,
                      ": vocab_ranges must ascend without overlap or empty range inside vocab_size = ",
                      weight.sym_size(0), ", got ", *ranges);
    previous = end;
  }
}

// One value per row of x.
inline void check_per_row(const char* op, const char* name, const at::Tensor& t, at::ScalarType dtype,
                          const at::Tensor& x) {
  check_device(op, name, t, "x", x);
  check_dtype(op, name, t, dtype);
  check_shape(op, name, t, {x.sym_size(0)}, "[num_rows]");
  check_dense_rows(op, name, t);
}

inline at::Tensor empty_per_row(const at::Tensor& x, at::ScalarType dtype) {
  return at::empty_symint({x.sym_size(0)}, x.options().dtype(dtype));
}

inline std::tuple<at::Tensor, at::Tensor> lm_head_argmax_meta(const at::Tensor& x, const at::Tensor& weight,
                                                              OptionalRanges vocab_ranges) {
  check_head("lm_head_argmax", x, weight);
  check_vocab_ranges("lm_head_argmax", vocab_ranges, weight);
  return {empty_per_row(x, at::kLong), empty_per_row(x, at::kFloat)};
}

inline at::Tensor lm_head_logprobs_meta(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& token_ids,
                                        OptionalRanges vocab_ranges) {
  check_head("lm_head_logprobs", x, weight);
  check_vocab_ranges("lm_head_logprobs", vocab_ranges, weight);
  check_per_row("lm_head_logprobs", "token_ids", token_ids, at::kLong, x);
  return empty_per_row(x, at::kFloat);
}

inline std::tuple<at::Tensor, at::Tensor> lm_head_sample_meta(
    const at::Tensor& x, const at::Tensor& weight, const at::Tensor& temperature, const at::Tensor& top_k,
    const at::Tensor& top_p, const at::Tensor& min_p, const at::Tensor& seeds, const at::Tensor& offsets,
    const OptionalTensor& penalty_ids, const OptionalTensor& repetition_penalty, OptionalRanges vocab_ranges) {
  const char* op = "lm_head_sample";
  check_head(op, x, weight);
  check_vocab_ranges(op, vocab_ranges, weight);
  check_per_row(op, "temperature", temperature, at::kFloat, x);
  check_per_row(op, "top_k", top_k, at::kInt, x);
  check_per_row(op, "top_p", top_p, at::kFloat, x);
  check_per_row(op, "min_p", min_p, at::kFloat, x);
  check_per_row(op, "seeds", seeds, at::kLong, x);
  check_per_row(op, "offsets", offsets, at::kLong, x);
  TORCH_CHECK_VALUE(penalty_ids.has_value() == repetition_penalty.has_value(), op,
                    ": penalty_ids and repetition_penalty must be given together, got only ",
                    penalty_ids.has_value() ? "penalty_ids" : "repetition_penalty");
  if (penalty_ids.has_value()) {
    check_device(op, "penalty_ids", *penalty_ids, "x", x);
    check_dtype(op, "penalty_ids", *penalty_ids, at::kLong);
    check_shape(op, "penalty_ids", *penalty_ids, {x.sym_size(0), -1}, "[num_rows, num_penalised]");
    check_dense_rows(op, "penalty_ids", *penalty_ids);
    check_per_row(op, "repetition_penalty", *repetition_penalty, at::kFloat, x);
  }
  return {empty_per_row(x, at::kLong), empty_per_row(x, at::kFloat)};
}

}  // namespace persimmon_fast
