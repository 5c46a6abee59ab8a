// lm_head_argmax, lm_head_logprobs, lm_head_sample on a CPU: the products, threads.
//
// Logits are made in fp32, block by block of the vocabulary, and reduced by the thread that made them; only sampling
// keeps those of up to 64 rows (64 MB at 262,144 tokens). vocab_ranges: blocks are cut from the ranges, so weights
// outside of them are not read. Two ways to make a block, neither of which rounds a logit to
// 16 bits, as torch's 16-bit products do:
//   up to 16 rows           stream_rows: one pass over the weights at the speed of memory
//   more, bf16, AMX         oneDNN's tile product with fp32 output (at::native::cpublas::brgemm), weights times x^T, so
//                           that the weights are read as they lie
//   more, everything else   stream_rows in groups of 16 rows: bound by fp32 FMAs, as torch's fp32 product is
//
// Measured  [131072, 4096] bf16, 1 thread, CPU time. Reading the weights: 67 ms; 1 row 71, 8 rows 76, 16 rows 81 ms.
//           lm_head_logprobs of more rows against torch's linear + log_softmax + gather: 17 rows 92 (152) ms, 64 rows
//           126 (211), 128 rows 190 (338), 256 rows 401 (512). Sampling on top of the product, per row of 262,144
//           tokens: 0.1-0.4 ms greedy, 0.3-0.7 with top-k or min-p, 0.6-0.8 unfiltered, 1.3-2.0 with top-p
//           alone. Sapphire-Rapids-class Xeon, torch 2.13.0+cpu, 2026-11
#include "csrc/ops/lm_head.h"

#include <ATen/native/CPUBlas.h>
#include <ATen/ops/constant_pad_nd.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "csrc/cpu/lm_head.h"
#include "csrc/cpu/sample.h"
#include "csrc/ops/stream.h"

namespace persimmon_fast {
namespace {

constexpr float kMinusInf = -std::numeric_limits<float>::infinity();
constexpr int64_t kMaxSampleRows = 64;  // whose logits are kept at once
// Rows whose logits pass through a block. 256 spill the caches: 506 GFLOP/s per thread, 128: 696, 64: 534.
constexpr int64_t kMaxReducedRows = 128;

bool use_brgemm(const at::Tensor& x, int64_t num_rows) {
#ifdef CPUBLAS_BRGEMM_BF16BF16F32
  return cpu::active_isa() == cpu::Isa::kAmx && x.scalar_type() == at::kBFloat16 && num_rows > cpu::kMaxStreamRows &&
         x.size(1) % 32 == 0;
#else
  return false;
#endif
}

// A block of the vocabulary: logits [num_rows, num_tokens], rows row_stride floats apart.
struct Block {
  int64_t index;
  int64_t first_token;
  int64_t num_tokens;
  float* logits;
  int64_t row_stride;
};

struct TokenRange {
  int64_t begin;
  int64_t end;
};
using TokenRanges = std::vector<TokenRange>;

TokenRanges kept_tokens(const OptionalRanges& vocab_ranges, int64_t vocab_size) {
  if (!vocab_ranges.has_value()) return {{0, vocab_size}};
  TokenRanges kept;
  for (size_t i = 0; i < vocab_ranges->size(); i += 2) kept.push_back({(*vocab_ranges)[i], (*vocab_ranges)[i + 1]});
  return kept;
}

// The ranges in pieces of at most `size` tokens.
TokenRanges cut(const TokenRanges& ranges, int64_t size) {
  TokenRanges pieces;
  for (const TokenRange& range : ranges) {
    for (int64_t begin = range.begin; begin < range.end; begin += size) {
      pieces.push_back({begin, std::min(begin + size, range.end)});
    }
  }
  return pieces;
}

// Tokens of a block: few, so that threads have equal shares and 128 rows of logits stay in cache; of 29,184 tokens one
// row takes 7.9 ms, with 4,096 tokens to a block 8.9. Not a function of the threads: it decides the order of a sum.
constexpr int64_t kBlockTokens = 512;

// Calls body(Block) for x W^T at each of these blocks of tokens, on all threads. keep: [num_rows, vocab_size], or null.
template <typename Body>
void for_each_block(const at::Tensor& x, const at::Tensor& weight, const TokenRanges& blocks, float* keep,
                    const Body& body) {
  const int64_t num_rows = x.size(0);
  const int64_t vocab_size = weight.size(0);
  const int64_t hidden_size = weight.size(1);
  const bool brgemm = use_brgemm(x, num_rows);
  const int64_t padded_rows = (num_rows + 15) / 16 * 16;
  at::Tensor packed;
  if (brgemm) {  // [hidden_size / 2, rows, 2], the order of AMX's second operand
    packed = at::constant_pad_nd(x, {0, 0, 0, padded_rows - num_rows})
                 .view({padded_rows, hidden_size / 2, 2})
                 .transpose(0, 1)
                 .contiguous();
  } else {
    packed = pack_activations(x);
  }
  const char* weights = static_cast<const char*>(weight.const_data_ptr());
  const int64_t weight_stride = weight.stride(0);
  const int64_t weight_bytes = weight_stride * weight.element_size();
  const int64_t grain = std::max<int64_t>(1, cpu::stream_grain(hidden_size) / kBlockTokens);
  at::parallel_for(0, static_cast<int64_t>(blocks.size()), grain, [&](int64_t begin, int64_t end) {
    std::vector<float> buffer(keep == nullptr ? num_rows * kBlockTokens : 0);
    std::vector<float> product(brgemm ? kBlockTokens * padded_rows : 0);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = blocks[b].begin;
      const int64_t count = blocks[b].end - first;
      const Block block = keep == nullptr ? Block{b, first, count, buffer.data(), kBlockTokens}
                                          : Block{b, first, count, keep + first, vocab_size};
      if (brgemm) {
#ifdef CPUBLAS_BRGEMM_BF16BF16F32
        at::native::cpublas::brgemm(count, padded_rows, hidden_size, weight_stride, padded_rows, padded_rows, false,
                                    reinterpret_cast<const at::BFloat16*>(weights + first * weight_bytes),
                                    packed.const_data_ptr<at::BFloat16>(), product.data());
        cpu::transpose_logits({product.data(), padded_rows, block.logits, block.row_stride, count}, 0, num_rows);
#endif
      } else {
        cpu::StreamParams p{};
        p.weight = weights + first * weight_bytes;
        p.packed = packed.const_data_ptr<float>();
        p.out = block.logits;
        p.num_rows = num_rows;
        p.in_features = hidden_size;
        p.weight_row_stride = weight_stride;
        p.out_row_stride = block.row_stride;
        p.dtype = dtype_tag(weight);
        cpu::stream_rows(p, 0, count);
      }
      body(block);
    }
#ifdef CPUBLAS_BRGEMM_BF16BF16F32
    if (brgemm) at::native::cpublas::brgemm_release();
#endif
  });
}

// Stats of every row of x W^T over the ranges; also calls body(Block), see for_each_block.
template <typename Body>
std::vector<cpu::LogitStats> head_stats(const at::Tensor& x, const at::Tensor& weight, const TokenRanges& ranges,
                                        float* keep, const Body& body) {
  const int64_t num_rows = x.size(0);
  const TokenRanges places = cut(ranges, kBlockTokens);
  const int64_t num_blocks = static_cast<int64_t>(places.size());
  std::vector<cpu::LogitStats> blocks(num_rows * num_blocks);
  for_each_block(x, weight, places, keep, [&](const Block& block) {
    cpu::logit_stats(
        {block.logits, block.row_stride, block.first_token, block.num_tokens, &blocks[block.index], num_blocks}, 0,
        num_rows);
    body(block);
  });
  std::vector<cpu::LogitStats> stats;
  stats.reserve(num_rows);
  for (int64_t row = 0; row < num_rows; ++row) {
    stats.push_back(cpu::merge_stats(&blocks[row * num_blocks], num_blocks));
  }
  return stats;
}

// Calls body(first_row, rows of x) for as many rows at a time as the product takes.
template <typename Body>
void for_each_chunk(const at::Tensor& x, int64_t max_rows, const Body& body) {
  const int64_t num_rows = x.size(0);
  const int64_t chunk = use_brgemm(x, num_rows) ? max_rows : cpu::kMaxStreamRows;
  for (int64_t row = 0; row < num_rows; row += chunk) {
    body(row, x.narrow(0, row, std::min(chunk, num_rows - row)));
  }
}

// ---- lm_head_argmax ----

std::tuple<at::Tensor, at::Tensor> lm_head_argmax_cpu(const at::Tensor& x, const at::Tensor& weight,
                                                      OptionalRanges vocab_ranges) {
  auto [token_ids, logprobs] = lm_head_argmax_meta(x, weight, vocab_ranges);
  const TokenRanges ranges = kept_tokens(vocab_ranges, weight.size(0));
  int64_t* tokens = token_ids.mutable_data_ptr<int64_t>();
  float* out = logprobs.mutable_data_ptr<float>();
  for_each_chunk(x, kMaxReducedRows, [&](int64_t first_row, const at::Tensor& rows) {
    const auto stats = head_stats(rows, weight, ranges, nullptr, [](const Block&) {});
    for (size_t i = 0; i < stats.size(); ++i) {
      tokens[first_row + i] = stats[i].argmax;
      out[first_row + i] = cpu::logprob(stats[i], stats[i].max);
    }
  });
  return {token_ids, logprobs};
}

// ---- lm_head_logprobs ----

at::Tensor lm_head_logprobs_cpu(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& token_ids,
                                OptionalRanges vocab_ranges) {
  at::Tensor logprobs = lm_head_logprobs_meta(x, weight, token_ids, vocab_ranges);
  const TokenRanges ranges = kept_tokens(vocab_ranges, weight.size(0));
  const int64_t* tokens = token_ids.const_data_ptr<int64_t>();
  for (int64_t row = 0; row < x.size(0); ++row) {
    TORCH_CHECK_VALUE(tokens[row] >= 0 && tokens[row] < weight.size(0), "lm_head_logprobs: token_ids[", row,
                      "] must be a token below vocab_size = ", weight.size(0), ", got ", tokens[row]);
  }
  float* out = logprobs.mutable_data_ptr<float>();
  std::fill_n(out, x.size(0), kMinusInf);  // remains where the token lies outside of the ranges
  for_each_chunk(x, kMaxReducedRows, [&](int64_t first_row, const at::Tensor& rows) {
    const auto stats = head_stats(rows, weight, ranges, nullptr, [&](const Block& block) {
      for (int64_t i = 0; i < rows.size(0); ++i) {
        const int64_t place = tokens[first_row + i] - block.first_token;
        if (place >= 0 && place < block.num_tokens) out[first_row + i] = block.logits[i * block.row_stride + place];
      }
    });
    for (size_t i = 0; i < stats.size(); ++i) out[first_row + i] = cpu::logprob(stats[i], out[first_row + i]);
  });
  return logprobs;
}

// ---- lm_head_sample ----

constexpr const char* kSample = "lm_head_sample";

template <typename T, typename InRange>
void check_values(const char* name, const at::Tensor& t, const char* range, const InRange& in_range) {
  const T* values = t.const_data_ptr<T>();
  for (int64_t row = 0; row < t.size(0); ++row) {
    TORCH_CHECK_VALUE(in_range(values[row]), kSample, ": ", name, "[", row, "] must be ", range, ", got ", values[row]);
  }
}

// The logits of the tokens outside of the ranges; logits: [num_rows, vocab_size].
void fill_skipped(const TokenRanges& ranges, int64_t num_rows, int64_t vocab_size, float* logits) {
  for (int64_t row = 0; row < num_rows; ++row, logits += vocab_size) {
    int64_t token = 0;
    for (const TokenRange& range : ranges) {
      std::fill(logits + token, logits + range.begin, kMinusInf);
      token = range.end;
    }
    std::fill(logits + token, logits + vocab_size, kMinusInf);
  }
}

std::tuple<at::Tensor, at::Tensor> lm_head_sample_cpu(
    const at::Tensor& x, const at::Tensor& weight, const at::Tensor& temperature, const at::Tensor& top_k,
    const at::Tensor& top_p, const at::Tensor& min_p, const at::Tensor& seeds, const at::Tensor& offsets,
    const OptionalTensor& penalty_ids, const OptionalTensor& repetition_penalty, OptionalRanges vocab_ranges) {
  auto [token_ids, logprobs] = lm_head_sample_meta(x, weight, temperature, top_k, top_p, min_p, seeds, offsets,
                                                   penalty_ids, repetition_penalty, vocab_ranges);
  const int64_t vocab_size = weight.size(0);
  const TokenRanges ranges = kept_tokens(vocab_ranges, vocab_size);
  check_values<float>("temperature", temperature, "finite and at least 0",
                      [](float t) { return std::isfinite(t) && t >= 0.0f; });
  check_values<int32_t>("top_k", top_k, "at least 0", [](int32_t k) { return k >= 0; });
  check_values<float>("top_p", top_p, "in (0, 1]", [](float p) { return p > 0.0f && p <= 1.0f; });
  check_values<float>("min_p", min_p, "in [0, 1]", [](float p) { return p >= 0.0f && p <= 1.0f; });
  if (penalty_ids.has_value()) {
    check_values<float>("repetition_penalty", *repetition_penalty, "finite and above 0",
                        [](float p) { return std::isfinite(p) && p > 0.0f; });
    for (int64_t row = 0; row < x.size(0); ++row) {
      const int64_t* ids = penalty_ids->const_data_ptr<int64_t>() + row * penalty_ids->stride(0);
      for (int64_t i = 0; i < penalty_ids->size(1); ++i) {
        TORCH_CHECK_VALUE(ids[i] < vocab_size, kSample, ": penalty_ids[", row, ", ", i,
                          "] must be a token below vocab_size = ", vocab_size, " or negative, got ", ids[i]);
      }
    }
  }

  for_each_chunk(x, kMaxSampleRows, [&](int64_t first_row, const at::Tensor& rows) {
    const int64_t num_rows = rows.size(0);
    const at::Tensor logits = fp32_scratch(num_rows * vocab_size);
    fill_skipped(ranges, num_rows, vocab_size, logits.mutable_data_ptr<float>());
    const auto stats = head_stats(rows, weight, ranges, logits.mutable_data_ptr<float>(), [](const Block&) {});
    std::vector<int64_t> argmax(num_rows);
    const at::Tensor finite = at::empty({num_rows}, at::kBool);
    for (int64_t i = 0; i < num_rows; ++i) {
      argmax[i] = stats[i].argmax;
      finite.mutable_data_ptr<bool>()[i] = std::isfinite(stats[i].max) && std::isfinite(stats[i].sum);
    }
    cpu::SampleParams p{};
    p.logits = logits.const_data_ptr<float>();
    p.logits_row_stride = vocab_size;
    p.vocab_size = vocab_size;
    p.argmax = argmax.data();
    p.finite = finite.const_data_ptr<bool>();
    p.temperature = temperature.const_data_ptr<float>() + first_row;
    p.top_k = top_k.const_data_ptr<int32_t>() + first_row;
    p.top_p = top_p.const_data_ptr<float>() + first_row;
    p.min_p = min_p.const_data_ptr<float>() + first_row;
    p.seeds = seeds.const_data_ptr<int64_t>() + first_row;
    p.offsets = offsets.const_data_ptr<int64_t>() + first_row;
    if (penalty_ids.has_value()) {
      p.penalty_row_stride = penalty_ids->stride(0);
      p.penalty_ids = penalty_ids->const_data_ptr<int64_t>() + first_row * p.penalty_row_stride;
      p.num_penalised = penalty_ids->size(1);
      p.repetition_penalty = repetition_penalty->const_data_ptr<float>() + first_row;
    }
    p.token_ids = token_ids.mutable_data_ptr<int64_t>() + first_row;
    at::parallel_for(0, num_rows, std::max<int64_t>(1, 65536 / vocab_size), [&](int64_t begin, int64_t end) {
      const int64_t num_groups = cpu::num_sample_groups(vocab_size);
      const at::Tensor scratch = fp32_scratch(num_groups * (cpu::kSampleGroup + 1) + vocab_size);
      cpu::SampleParams task = p;
      task.scaled = scratch.mutable_data_ptr<float>();
      task.group_max = task.scaled + num_groups * cpu::kSampleGroup;
      task.selection = task.group_max + num_groups;
      cpu::sample(task, begin, end);
    });
    for (int64_t i = 0; i < num_rows; ++i) {
      const float logit = p.logits[i * vocab_size + p.token_ids[i]];
      logprobs.mutable_data_ptr<float>()[first_row + i] = cpu::logprob(stats[i], logit);
    }
  });
  return {token_ids, logprobs};
}

}  // namespace

TORCH_LIBRARY_IMPL(persimmon_fast, Meta, m) {
  m.impl("lm_head_argmax", lm_head_argmax_meta);
  m.impl("lm_head_logprobs", lm_head_logprobs_meta);
  m.impl("lm_head_sample", lm_head_sample_meta);
}

TORCH_LIBRARY_IMPL(persimmon_fast, CPU, m) {
  m.impl("lm_head_argmax", lm_head_argmax_cpu);
  m.impl("lm_head_logprobs", lm_head_logprobs_cpu);
  m.impl("lm_head_sample", lm_head_sample_cpu);
}

}  // namespace persimmon_fast
