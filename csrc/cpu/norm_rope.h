// What is done to one head of q or k after its projection: LayerNorm, rotary embedding, one rounding. For kernel files.
#pragma once

#include <cmath>
#include <cstdint>

#include "csrc/common/norm_rope_params.h"
#include "csrc/cpu/vec.h"

namespace persimmon_fast::cpu::PF_ISA {

// LayerNorm in place: (x - mean) / sqrt(variance + eps) * weight + bias, two passes.
template <typename T>
inline void norm_head(float* head, int64_t head_dim, const T* weight, const T* bias, float eps) {
  Vec sum = Vec::zero();
  for (int64_t c = 0; c < head_dim; c += Vec::kWidth) sum = sum + load_part(head + c, head_dim - c);
  const float mean = reduce_add(sum) / head_dim;
  // Lanes beyond head_dim would count as 0 - mean: the tail is added one by one.
  const int64_t whole = head_dim / Vec::kWidth * Vec::kWidth;
  Vec squares = Vec::zero();
  for (int64_t c = 0; c < whole; c += Vec::kWidth) {
    const Vec deviation = load(head + c) - Vec::set1(mean);
    squares = fma(deviation, deviation, squares);
  }
  float square = reduce_add(squares);
  for (int64_t c = whole; c < head_dim; ++c) square += (head[c] - mean) * (head[c] - mean);
  const float rstd = 1.0f / std::sqrt(square / head_dim + eps);
  for (int64_t c = 0; c < head_dim; c += Vec::kWidth) {
    const int64_t n = head_dim - c;
    const Vec normed = (load_part(head + c, n) - Vec::set1(mean)) * Vec::set1(rstd);
    store_part(head + c, fma(normed, load_part(weight + c, n), load_part(bias + c, n)), n);
  }
}

// Rotates the pairs (c, c + half) in place, half = rotary_dim / 2; cos_sin: half cosines, then half sines.
inline void rope_head(float* head, int64_t rotary_dim, const float* cos_sin) {
  const int64_t half = rotary_dim / 2;
  for (int64_t c = 0; c < half; c += Vec::kWidth) {
    const int64_t n = half - c;
    const Vec first = load_part(head + c, n);
    const Vec second = load_part(head + half + c, n);
    const Vec cos = load_part(cos_sin + c, n);
    const Vec sin = load_part(cos_sin + half + c, n);
    store_part(head + c, first * cos - second * sin, n);
    store_part(head + half + c, fma(second, cos, first * sin), n);
  }
}

// head (fp32, overwritten) -> out: LayerNorm with `norm` where it has a weight, rotary at position_ids[token].
template <typename T>
inline void norm_rope_head(float* head, const NormRopeParams& p, const HeadNorm& norm, int64_t token, int64_t head_idx,
                           T* out) {
  if (norm.weight != nullptr) {
    const int64_t offset = head_idx * norm.head_stride;
    norm_head(head, p.head_dim, static_cast<const T*>(norm.weight) + offset, static_cast<const T*>(norm.bias) + offset,
              p.eps);
  }
  rope_head(head, p.rotary_dim, p.cos_sin + p.position_ids[token] * p.cos_sin_row_stride);
  for (int64_t c = 0; c < p.head_dim; c += Vec::kWidth) {
    store_part(out + c, load_part(head + c, p.head_dim - c), p.head_dim - c);
  }
}

}  // namespace persimmon_fast::cpu::PF_ISA
