// lm_head_argmax, lm_head_logprobs, lm_head_sample on CUDA: scratch, chunks of rows, launches. The values of per-row
// arguments are not checked, as that would wait for the device; docs/kernels/lm_head.md says what wrong ones do.
#include "csrc/ops/lm_head.h"

#include <ATen/ops/empty.h>

#include <algorithm>

#include "csrc/cuda/lm_head.h"
#include "csrc/cuda/sample.h"
#include "csrc/ops/cuda/device.h"

namespace persimmon_fast {
namespace {

constexpr int64_t kMaxReducedRows = 1024;  // whose statistics are kept at once: 25 MB at 262,144 tokens
constexpr int64_t kMaxSampleRows = 64;     // whose logits are kept at once: 64 MB

void check_vocab_size(const char* op, const at::Tensor& weight, int64_t max_size) {
  TORCH_CHECK_VALUE(weight.size(0) <= max_size, op, ": weight must have vocab_size <= ", max_size, " on CUDA, got ",
                    weight.size(0));
}

// body(first row, number of rows) for parts of at most max_rows rows, all of about the same size: a part of a large
// batch never takes the kernel for a few rows, which adds in another order.
template <typename Body>
void for_parts(int64_t num_rows, int64_t max_rows, const Body& body) {
  const int64_t num_parts = (num_rows + max_rows - 1) / max_rows;
  for (int64_t part = 0; part < num_parts; ++part) {
    const int64_t row = num_rows * part / num_parts;
    body(row, num_rows * (part + 1) / num_parts - row);
  }
}

// Uninitialised scratch for `count` elements of T.
template <typename T>
struct Scratch {
  at::Tensor bytes;

  Scratch(int64_t count, const at::Tensor& like)
      : bytes(at::empty({count * static_cast<int64_t>(sizeof(T))}, like.options().dtype(at::kByte))) {
#ifdef PF_EMULATE
    bytes.fill_(0x7f);  // 3.4e38 in every float: what is read before it is written shows
#endif
  }
  T* data() const { return reinterpret_cast<T*>(bytes.mutable_data_ptr()); }
};

struct TileScratch {
  Scratch<float> max, sum;
  Scratch<int32_t> token;

  TileScratch(int64_t count, const at::Tensor& like) : max(count, like), sum(count, like), token(count, like) {}
  cuda::TileStats stats() const { return {max.data(), sum.data(), token.data()}; }
};

// Ranges that touch become one, as the kernels want them.
VocabRanges kernel_ranges(const OptionalRanges& vocab_ranges) {
  VocabRanges ranges{};
  if (!vocab_ranges.has_value()) return ranges;
  for (size_t i = 0; i < vocab_ranges->size(); i += 2) {
    const auto begin = static_cast<int32_t>((*vocab_ranges)[i]);
    if (ranges.count == 0 || ranges.end[ranges.count - 1] != begin) ranges.begin[ranges.count++] = begin;
    ranges.end[ranges.count - 1] = static_cast<int32_t>((*vocab_ranges)[i + 1]);
  }
  return ranges;
}

cuda::LmHeadParams head_params(const at::Tensor& x, const at::Tensor& weight, const cuda::TileStats& tiles,
                               const VocabRanges& ranges) {
  cuda::LmHeadParams p{};
  p.x = x.const_data_ptr();
  p.weight = weight.const_data_ptr();
  p.x_row_stride = x.stride(0);
  p.weight_row_stride = weight.stride(0);
  p.num_rows = x.size(0);
  p.vocab_size = weight.size(0);
  p.hidden_size = weight.size(1);
  p.tiles = tiles;
  p.ranges = ranges;
  p.num_multiprocessors = num_multiprocessors();
  p.dtype = dtype_tag(x);
  return p;
}

// token_ids: the most likely tokens go there; target_ids: the log-probabilities are those of these tokens. One is null.
void reduce_head(const char* op, const at::Tensor& x, const at::Tensor& weight, const OptionalRanges& vocab_ranges,
                 int64_t* token_ids, const int64_t* target_ids, float* logprobs) {
  check_vocab_size(op, weight, INT32_MAX - cuda::kVocabTile);
  const int64_t max_rows = std::min(x.size(0), kMaxReducedRows);
  const TileScratch tiles(max_rows * cuda::num_vocab_tiles(weight.size(0)), x);
  const Scratch<float> target(target_ids != nullptr ? max_rows : 0, x);
  for_parts(x.size(0), kMaxReducedRows, [&](int64_t row, int64_t num_rows) {
    const at::Tensor rows = x.narrow(0, row, num_rows);
    cuda::LmHeadParams head = head_params(rows, weight, tiles.stats(), kernel_ranges(vocab_ranges));
    cuda::LmHeadMergeParams merge{};
    merge.tiles = head.tiles;
    merge.ranges = head.ranges;
    merge.num_rows = head.num_rows;
    merge.vocab_size = head.vocab_size;
    merge.logprobs = logprobs + row;
    if (target_ids != nullptr) {
      head.target_ids = merge.target_ids = target_ids + row;
      head.target = target.data();
      merge.target = head.target;
    } else {
      merge.token_ids = token_ids + row;
    }
    check_launch(op, cuda::launch_lm_head(head, current_stream()));
    check_launch(op, cuda::launch_lm_head_merge(merge, current_stream()));
  });
}

std::tuple<at::Tensor, at::Tensor> lm_head_argmax_cuda(const at::Tensor& x, const at::Tensor& weight,
                                                       OptionalRanges vocab_ranges) {
  const DeviceGuard guard(x.device());
  auto [token_ids, logprobs] = lm_head_argmax_meta(x, weight, vocab_ranges);
  reduce_head("lm_head_argmax", x, weight, vocab_ranges, token_ids.mutable_data_ptr<int64_t>(), nullptr,
              logprobs.mutable_data_ptr<float>());
  return {token_ids, logprobs};
}

at::Tensor lm_head_logprobs_cuda(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& token_ids,
                                 OptionalRanges vocab_ranges) {
  const DeviceGuard guard(x.device());
  at::Tensor logprobs = lm_head_logprobs_meta(x, weight, token_ids, vocab_ranges);
  reduce_head("lm_head_logprobs", x, weight, vocab_ranges, nullptr, token_ids.const_data_ptr<int64_t>(),
              logprobs.mutable_data_ptr<float>());
  return logprobs;
}

std::tuple<at::Tensor, at::Tensor> lm_head_sample_cuda(
    const at::Tensor& x, const at::Tensor& weight, const at::Tensor& temperature, const at::Tensor& top_k,
    const at::Tensor& top_p, const at::Tensor& min_p, const at::Tensor& seeds, const at::Tensor& offsets,
    const OptionalTensor& penalty_ids, const OptionalTensor& repetition_penalty, OptionalRanges vocab_ranges) {
  const DeviceGuard guard(x.device());
  auto [token_ids, logprobs] = lm_head_sample_meta(x, weight, temperature, top_k, top_p, min_p, seeds, offsets,
                                                   penalty_ids, repetition_penalty, vocab_ranges);
  const int64_t vocab_size = weight.size(0);
  check_vocab_size("lm_head_sample", weight, cuda::kMaxSampleVocab);
  const int64_t max_rows = std::min(x.size(0), kMaxSampleRows);
  const int64_t num_tiles = max_rows * cuda::num_vocab_tiles(vocab_size);
  const int64_t num_candidates = max_rows * cuda::num_draw_blocks(vocab_size);
  const int64_t num_penalised = penalty_ids.has_value() ? penalty_ids->size(1) : 0;
  const TileScratch tiles(num_tiles, x);
  const Scratch<float> logits(num_tiles * cuda::kVocabTile, x);
  const Scratch<cuda::SampleRow> states(max_rows, x);
  const Scratch<cuda::FixedMass> mass(max_rows * cuda::kNucleusLevels * cuda::kNucleusBins, x);
  const Scratch<float> bare_logits(max_rows * num_penalised, x);
  const Scratch<double> candidate_scores(num_candidates, x);
  const Scratch<int32_t> candidate_tokens(num_candidates, x);
  for_parts(x.size(0), kMaxSampleRows, [&](int64_t row, int64_t num_rows) {
    const at::Tensor rows = x.narrow(0, row, num_rows);
    cuda::LmHeadParams head = head_params(rows, weight, tiles.stats(), kernel_ranges(vocab_ranges));
    head.logits = logits.data();
    cuda::SampleParams p{};
    p.tiles = head.tiles;
    p.logits = head.logits;
    p.num_rows = head.num_rows;
    p.vocab_size = vocab_size;
    p.temperature = temperature.const_data_ptr<float>() + row;
    p.top_k = top_k.const_data_ptr<int32_t>() + row;
    p.top_p = top_p.const_data_ptr<float>() + row;
    p.min_p = min_p.const_data_ptr<float>() + row;
    p.seeds = seeds.const_data_ptr<int64_t>() + row;
    p.offsets = offsets.const_data_ptr<int64_t>() + row;
    if (penalty_ids.has_value()) {
      p.penalty_row_stride = penalty_ids->stride(0);
      p.penalty_ids = penalty_ids->const_data_ptr<int64_t>() + row * p.penalty_row_stride;
      p.num_penalised = num_penalised;
      p.repetition_penalty = repetition_penalty->const_data_ptr<float>() + row;
    }
    p.rows = states.data();
    p.mass = mass.data();
    p.bare_logits = bare_logits.data();
    p.candidate_scores = candidate_scores.data();
    p.candidate_tokens = candidate_tokens.data();
    p.token_ids = token_ids.mutable_data_ptr<int64_t>() + row;
    p.logprobs = logprobs.mutable_data_ptr<float>() + row;
    check_launch("lm_head_sample", cuda::launch_lm_head(head, current_stream()));
    check_launch("lm_head_sample", cuda::launch_sample(p, current_stream()));
  });
  return {token_ids, logprobs};
}

}  // namespace

PF_CUDA_LIBRARY_IMPL(m) {
  m.impl("lm_head_argmax", lm_head_argmax_cuda);
  m.impl("lm_head_logprobs", lm_head_logprobs_cuda);
  m.impl("lm_head_sample", lm_head_sample_cuda);
}

}  // namespace persimmon_fast
