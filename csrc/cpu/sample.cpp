// sample: argmax over the kept tokens of z - log(E), E exponential numbers of Philox (reference.lm_head_sample)
//
// Work      one row per task. z = penalised logits / temperature, with the maximum of every group of 64 tokens; every
//           filter is a threshold on z, so groups below it are skipped from then on
// Top-k     the k-th largest group maximum is a lower bound of the k-th largest z: only the few z above it are selected
// Top-p     a histogram of probability over the distance from the largest z, 64 bins per e-fold, finds the bin in which
//           the nucleus ends; that bin alone is sorted
// Draw      a token beats the best score so far if its uniform number u is below 1 - exp(-exp(z - best)) <= exp(z -
//           best). The right side is one fp32 exp per token; the few tokens that pass (about one in e-folds of the
//           remaining mass) are scored exactly, in fp64, as the reference does it. The order cannot change the result
// Traffic   z once or twice from cache; Philox runs only for groups of 64 tokens of which one may win
// Numerics  z as the reference: fp32 products and quotients, each rounded once. Probabilities of the nucleus in fp64
// Source    Gumbel-max: Maddison et al. 2014, A* sampling, arXiv:1411.0030; Keskar et al. 2019, CTRL,
//           arXiv:1909.05858 (penalty); Holtzman et al. 2020, arXiv:1904.09751 (top-p); Nguyen et al. 2024,
//           arXiv:2407.01082 (min-p)
#include "csrc/cpu/sample.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "csrc/common/philox.h"
#include "csrc/cpu/vec.h"

namespace persimmon_fast::cpu::PF_ISA {
namespace {

constexpr int kW = Vec::kWidth;
constexpr int kGroup = static_cast<int>(kSampleGroup);
constexpr int kBins = 4096;  // of 1/64 below the largest z; the last one holds everything from 64 on
constexpr float kMinusInf = -std::numeric_limits<float>::infinity();

// Rounding keeps the order: a larger z is never in a later bin.
inline int bin_of(float z, float best) {
  const float distance = (best - z) * 64.0f;
  return static_cast<int>(distance < kBins - 1 ? distance : kBins - 1);
}

// e^x for x <= 0 in fp64 to a few ulp, in operations that the compiler can vectorise: 2^n * e^f, n = round(x / ln 2)
// from the low bits of x / ln 2 + 1.5 * 2^52, e^f by its Taylor polynomial of degree 13 (|f| <= 0.35: 4e-18).
inline double exp_nonpositive(double x) {
  constexpr double kShift = 0x1.8p52;
  x = x < -700.0 ? -700.0 : x;  // 1e-304: no part of any sum
  const double shifted = x * 1.4426950408889634 + kShift;
  const double n = shifted - kShift;
  const double f = (x - n * 0x1.62e42fee00000p-1) - n * 0x1.a39ef35793c76p-33;
  double p = 1.0 / 6227020800.0;
  for (const double c : {1.0 / 479001600.0, 1.0 / 39916800.0, 1.0 / 3628800.0, 1.0 / 362880.0, 1.0 / 40320.0,
                         1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0}) {
    p = p * f + c;
  }
  uint64_t exponent;
  std::memcpy(&exponent, &shifted, sizeof(exponent));
  exponent = (exponent + 1023) << 52;
  double scale;
  std::memcpy(&scale, &exponent, sizeof(scale));
  return p * scale;
}

// z of one row into p.scaled, padded with -inf, and the maximum of each group; returns the maximum of the row.
float scale_logits(const SampleParams& p, int64_t row, float temperature) {
  const float* logits = p.logits + row * p.logits_row_stride;
  float* z = p.scaled;
  for (int64_t i = 0; i < p.vocab_size; ++i) z[i] = logits[i] / temperature;
  std::fill(z + p.vocab_size, z + num_sample_groups(p.vocab_size) * kGroup, kMinusInf);
  if (p.penalty_ids != nullptr) {
    const float penalty = p.repetition_penalty[row];
    for (int64_t i = 0; i < p.num_penalised; ++i) {
      const int64_t token = p.penalty_ids[row * p.penalty_row_stride + i];
      if (token < 0) continue;
      const float logit = logits[token];
      z[token] = (logit < 0.0f ? logit * penalty : logit / penalty) / temperature;
    }
  }
  float best = kMinusInf;
  for (int64_t g = 0; g < num_sample_groups(p.vocab_size); ++g) {
    Vec lanes = load(z + g * kGroup);
    for (int i = kW; i < kGroup; i += kW) lanes = max(load(z + g * kGroup + i), lanes);
    p.group_max[g] = reduce_max(lanes);
    best = std::max(best, p.group_max[g]);
  }
  return best;
}

// Calls body(token, z) for every z >= threshold, in the order of the tokens.
template <typename Body>
inline void for_each_above(const SampleParams& p, float threshold, const Body& body) {
  for (int64_t g = 0; g < num_sample_groups(p.vocab_size); ++g) {
    if (p.group_max[g] < threshold) continue;
    const int64_t end = std::min((g + 1) * kGroup, p.vocab_size);
    for (int64_t i = g * kGroup; i < end; ++i) {
      if (p.scaled[i] >= threshold) body(i, p.scaled[i]);
    }
  }
}

// The k-th largest z.
float top_k_threshold(const SampleParams& p, int64_t k) {
  const int64_t num_groups = num_sample_groups(p.vocab_size);
  float bound = kMinusInf;
  if (k <= num_groups) {
    std::copy_n(p.group_max, num_groups, p.selection);
    std::nth_element(p.selection, p.selection + k - 1, p.selection + num_groups, std::greater<>());
    bound = p.selection[k - 1];
  }
  float* end = p.selection;
  for_each_above(p, bound, [&](int64_t, float z) { *end++ = z; });
  std::nth_element(p.selection, p.selection + k - 1, end, std::greater<>());
  return p.selection[k - 1];
}

// The smallest z of the nucleus: of the tokens with z >= threshold in descending order, the first one at which their
// share of the probability reaches top_p.
float top_p_threshold(const SampleParams& p, float best, float threshold, double top_p) {
  std::vector<double> mass(kBins, 0.0);
  double weights[kGroup];
  for (int64_t g = 0; g < num_sample_groups(p.vocab_size); ++g) {
    if (p.group_max[g] < threshold) continue;
    const float* z = p.scaled + g * kGroup;
    for (int i = 0; i < kGroup; ++i) weights[i] = exp_nonpositive(static_cast<double>(z[i]) - best);
    const int n = static_cast<int>(std::min<int64_t>(kGroup, p.vocab_size - g * kGroup));
    for (int i = 0; i < n; ++i) {
      if (z[i] >= threshold) mass[bin_of(z[i], best)] += weights[i];
    }
  }
  double total = 0.0;
  for (const double m : mass) total += m;
  double above = 0.0;
  int bin = 0;
  for (const int last = bin_of(threshold, best); bin < last && (above + mass[bin]) / total < top_p; ++bin) {
    above += mass[bin];
  }
  float* end = p.selection;
  for_each_above(p, threshold, [&](int64_t, float z) {
    if (bin_of(z, best) == bin) *end++ = z;
  });
  std::sort(p.selection, end, std::greater<>());
  float value = threshold;  // remains where rounding keeps the share of all of them below top_p
  for (const float* z = p.selection; z < end; ++z) {
    value = *z;
    above += exp_nonpositive(static_cast<double>(value) - best);
    if (above / total >= top_p) break;
  }
  return value;
}

// The smallest z that may be drawn.
float keep_threshold(const SampleParams& p, int64_t row, float best) {
  float threshold = kMinusInf;
  if (p.top_k[row] > 0 && p.top_k[row] < p.vocab_size) threshold = top_k_threshold(p, p.top_k[row]);
  if (p.top_p[row] < 1.0f) threshold = top_p_threshold(p, best, threshold, p.top_p[row]);
  if (p.min_p[row] > 0.0f) {
    const double bound = static_cast<double>(best) + std::log(static_cast<double>(p.min_p[row]));
    float rounded = static_cast<float>(bound);
    if (rounded < bound) rounded = std::nextafter(rounded, std::numeric_limits<float>::infinity());
    threshold = std::max(threshold, rounded);
  }
  return threshold;
}

struct Best {
  double score;
  int64_t token;
};

inline void consider(Best& best, float z, uint32_t word, int64_t token) {
  const double score = z - std::log(-std::log1p(-philox_to_uniform(word)));
  if (score > best.score || (score == best.score && token < best.token)) best = {score, token};
}

int64_t draw(const SampleParams& p, int64_t row, float max_z, float threshold) {
  const uint64_t seed = static_cast<uint64_t>(p.seeds[row]);
  const uint64_t offset = static_cast<uint64_t>(p.offsets[row]);
  const float* z = p.scaled;
  Best best{-std::numeric_limits<double>::infinity(), p.vocab_size};
  const int64_t likeliest = std::find(z, z + p.vocab_size, max_z) - z;
  consider(best, max_z, philox(seed, offset, static_cast<uint32_t>(likeliest / 4)).words[likeliest % 4], likeliest);

  alignas(64) float chance[kGroup];
  alignas(64) uint32_t words[kGroup];
  for (int64_t g = 0; g < num_sample_groups(p.vocab_size); ++g) {
    const int64_t begin = g * kGroup;
    const float* values = z + begin;
    // The slack covers the rounding of `best` to fp32 and of the fp32 exp: it only lets more tokens pass.
    const float bar = static_cast<float>(best.score - 1e-3 - 1e-6 * std::fabs(best.score));
    if (p.group_max[g] < threshold || p.group_max[g] - bar < -23.0f) continue;  // u > 2^-33 > e^-23

    for (int b = 0; b < kGroup / 4; ++b) {
      const PhiloxBlock block = philox(seed, offset, static_cast<uint32_t>(begin / 4 + b));
      for (int j = 0; j < 4; ++j) words[4 * b + j] = block.words[j];
    }
    for (int i = 0; i < kGroup; i += kW) store(chance + i, exp(load(values + i) - Vec::set1(bar)));
    int passed = 0;
    for (int i = 0; i < kGroup; ++i) {
      passed |= static_cast<float>(static_cast<int32_t>(words[i] >> 1)) * 0x1p-31f <= chance[i] ? 1 : 0;
    }
    if (passed == 0) continue;
    const int n = static_cast<int>(std::min<int64_t>(kGroup, p.vocab_size - begin));
    for (int i = 0; i < n; ++i) {
      if (values[i] >= threshold && static_cast<float>(static_cast<int32_t>(words[i] >> 1)) * 0x1p-31f <= chance[i]) {
        consider(best, values[i], words[i], begin + i);
      }
    }
  }
  return best.token;
}

}  // namespace

void sample(const SampleParams& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    p.token_ids[row] = p.argmax[row];
    bool greedy = p.temperature[row] == 0.0f;
    if (!p.finite[row] || (greedy && p.penalty_ids == nullptr)) continue;
    float best = scale_logits(p, row, greedy ? 1.0f : p.temperature[row]);
    if (!std::isfinite(best)) {  // a temperature so small that z overflows: its limit
      greedy = true;
      best = scale_logits(p, row, 1.0f);
    }
    if (greedy) {
      p.token_ids[row] = std::find(p.scaled, p.scaled + p.vocab_size, best) - p.scaled;
      continue;
    }
    p.token_ids[row] = draw(p, row, best, keep_threshold(p, row, best));
  }
}

}  // namespace persimmon_fast::cpu::PF_ISA
