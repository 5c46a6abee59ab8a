// LayerNorm and rotary embedding of one head in registers: what qk_norm_rope and the epilogue of qkv_norm_rope share.
//
// A head is held by kLanes neighbouring lanes. A lane holds pairs of vectors of kVec columns, and columns that rotate
// with each other lie in one pair: the rotation exchanges nothing, the statistics are two butterflies over kLanes.
// Columns from rotary_dim on are paired among themselves. head_dim 64, rotary_dim 32, kVec 8 (16 bytes of a 16-bit
// type):
//
//     lane             0        1        2        3
//     first vector   0 ..  7  8 .. 15 32 .. 39 40 .. 47
//     second vector 16 .. 23 24 .. 31 48 .. 55 56 .. 63
//                   |--- rotated ----|-- passed through --|
//
// kVec must divide rotary_dim / 2; kVec = 1 serves every other rotary_dim.
//
// Numerics  fp32; variance from deviations, with a corrected mean. The order of additions depends on head_dim, kVec and
//           rotary_dim alone
#pragma once

#include "csrc/common/norm_rope_params.h"
#include "csrc/cuda/convert.cuh"
#include "csrc/cuda/device.cuh"
#include "csrc/cuda/reduce.cuh"

namespace persimmon_fast::cuda {

template <int kHeadDim, int kVec>
struct HeadLayout {
  static constexpr int kNumPairs = kHeadDim / 2 / kVec;                         // of a head
  static constexpr int kLanes = kNumPairs < kWarpSize ? kNumPairs : kWarpSize;  // that share a head
  static constexpr int kPairs = kNumPairs / kLanes;                             // of a lane
  static_assert(kHeadDim % (2 * kVec) == 0 && kNumPairs % kLanes == 0 && kWarpSize % kLanes == 0);

  // Where the vectors of pair `i` of this lane begin.
  DEV static int2 columns(int i, int half_rotary_dim) {
    const int column = (i * kLanes + static_cast<int>(threadIdx.x) % kLanes) * kVec;
    return column < half_rotary_dim ? make_int2(column, column + half_rotary_dim)
                                    : make_int2(column + half_rotary_dim, column + kHeadDim / 2);
  }
};

// What a lane holds of a head.
template <int kHeadDim, int kVec>
struct HeadValues {
  float first[HeadLayout<kHeadDim, kVec>::kPairs][kVec];
  float second[HeadLayout<kHeadDim, kVec>::kPairs][kVec];
};

template <bool kAligned, int kHeadDim, int kVec, typename scalar_t>
DEV void load_head(const scalar_t* head, int half_rotary_dim, HeadValues<kHeadDim, kVec>& values) {
  using Layout = HeadLayout<kHeadDim, kVec>;
#pragma unroll
  for (int i = 0; i < Layout::kPairs; ++i) {
    const int2 column = Layout::columns(i, half_rotary_dim);
    load_vector<kAligned>(head + column.x, values.first[i]);
    load_vector<kAligned>(head + column.y, values.second[i]);
  }
}

template <bool kAligned, int kHeadDim, int kVec, typename scalar_t>
DEV void store_head(scalar_t* head, int half_rotary_dim, const HeadValues<kHeadDim, kVec>& values) {
  using Layout = HeadLayout<kHeadDim, kVec>;
#pragma unroll
  for (int i = 0; i < Layout::kPairs; ++i) {
    const int2 column = Layout::columns(i, half_rotary_dim);
    store_vector<kAligned>(head + column.x, values.first[i]);
    store_vector<kAligned>(head + column.y, values.second[i]);
  }
}

template <int kHeadDim, int kVec>
DEV void add(HeadValues<kHeadDim, kVec>& values, const HeadValues<kHeadDim, kVec>& addend) {
#pragma unroll
  for (int i = 0; i < HeadLayout<kHeadDim, kVec>::kPairs; ++i) {
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      values.first[i][j] += addend.first[i][j];
      values.second[i][j] += addend.second[i][j];
    }
  }
}

// What turns deviations from a rounded mean into normalised values: deviation * rstd + shift.
struct Normalisation {
  float rstd;
  float shift;
};

// deviation, square: sums of the deviations and of their squares over a head.
template <int kHeadDim>
DEV Normalisation normalisation(float deviation, float square, float eps) {
  // The deviations' own mean corrects the rounded one, as in layer_norm.
  const float correction = deviation / kHeadDim;
  const float variance = fmaf(-correction, correction, square / kHeadDim);
  // variance - variance: 0, or NaN where the squares overflowed, which 1 / inf would hide. fmaxf would turn NaN into 0.
  const float rstd = 1.0f / sqrtf((variance < 0.0f ? 0.0f : variance + (variance - variance)) + eps);
  return {rstd, -correction * rstd};
}

// Turns two values that belong together.
DEV void rotate(float& first, float& second, float cos, float sin) {
  const float turned = fmaf(first, cos, -(second * sin));
  second = fmaf(second, cos, first * sin);
  first = turned;
}

// values = (values - mean) * rstd * weight + bias. weight, bias: [kHeadDim] of this head. Every lane of the warp calls.
template <bool kAligned, int kHeadDim, int kVec, typename scalar_t>
DEV void norm_head(HeadValues<kHeadDim, kVec>& values, const scalar_t* weight, const scalar_t* bias, float eps,
                   int half_rotary_dim) {
  using Layout = HeadLayout<kHeadDim, kVec>;
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < Layout::kPairs; ++i) {
#pragma unroll
    for (int j = 0; j < kVec; ++j) total += values.first[i][j] + values.second[i][j];
  }
  const float rough_mean = sum_lanes<Layout::kLanes>(total) / kHeadDim;
  float deviation = 0.0f;
  float square = 0.0f;
#pragma unroll
  for (int i = 0; i < Layout::kPairs; ++i) {
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      values.first[i][j] -= rough_mean;
      values.second[i][j] -= rough_mean;
      deviation += values.first[i][j] + values.second[i][j];
      square = fmaf(values.first[i][j], values.first[i][j], square);
      square = fmaf(values.second[i][j], values.second[i][j], square);
    }
  }
  const Normalisation n =
      normalisation<kHeadDim>(sum_lanes<Layout::kLanes>(deviation), sum_lanes<Layout::kLanes>(square), eps);
#pragma unroll
  for (int i = 0; i < Layout::kPairs; ++i) {
    const int2 column = Layout::columns(i, half_rotary_dim);
    const auto scale = [&](int begin, float (&part)[kVec]) {
      float w[kVec];
      float b[kVec];
      load_vector<kAligned>(weight + begin, w);
      load_vector<kAligned>(bias + begin, b);
#pragma unroll
      for (int j = 0; j < kVec; ++j) part[j] = fmaf(fmaf(part[j], n.rstd, n.shift), w[j], b[j]);
    };
    scale(column.x, values.first[i]);
    scale(column.y, values.second[i]);
  }
}

// cos_sin: the row of the head's position, half_rotary_dim cosines, then as many sines.
template <bool kAligned, int kHeadDim, int kVec>
DEV void rope_head(HeadValues<kHeadDim, kVec>& values, const float* cos_sin, int half_rotary_dim) {
  using Layout = HeadLayout<kHeadDim, kVec>;
#pragma unroll
  for (int i = 0; i < Layout::kPairs; ++i) {
    const int column = Layout::columns(i, half_rotary_dim).x;
    if (column >= half_rotary_dim) continue;
    float cos[kVec];
    float sin[kVec];
    load_vector<kAligned>(cos_sin + column, cos);
    load_vector<kAligned>(cos_sin + half_rotary_dim + column, sin);
#pragma unroll
    for (int j = 0; j < kVec; ++j) rotate(values.first[i][j], values.second[i][j], cos[j], sin[j]);
  }
}

// The cosines and sines of a token.
DEV const float* cos_sin_row(const NormRopeParams& p, int64_t token) {
  return p.cos_sin + p.position_ids[token] * p.cos_sin_row_stride;
}

// LayerNorm with `norm` where it has a weight, then rotary. Every lane of the warp calls.
template <typename scalar_t, bool kAligned, int kHeadDim, int kVec>
DEV void norm_rope_head(HeadValues<kHeadDim, kVec>& values, const NormRopeParams& p, const HeadNorm& norm,
                        int64_t head_idx, const float* cos_sin) {
  const int half_rotary_dim = static_cast<int>(p.rotary_dim) / 2;
  if (norm.weight != nullptr) {
    const int64_t offset = head_idx * norm.head_stride;
    norm_head<kAligned>(values, static_cast<const scalar_t*>(norm.weight) + offset,
                        static_cast<const scalar_t*>(norm.bias) + offset, p.eps, half_rotary_dim);
  }
  rope_head<kAligned>(values, cos_sin, half_rotary_dim);
}

// Whether vectors of 16 bytes divide half of rotary_dim.
template <typename scalar_t>
bool has_whole_vectors(const NormRopeParams& p) {
  return p.rotary_dim / 2 % Chunk<scalar_t>::kSize == 0;
}

// Whether norm_rope_head may take kAligned with vectors of 16 bytes. (Weights per head: head_dim is whole vectors.)
inline bool is_aligned(const NormRopeParams& p) {
  return is_aligned(p.q_norm.weight) && is_aligned(p.q_norm.bias) && is_aligned(p.k_norm.weight) &&
         is_aligned(p.k_norm.bias) && is_aligned(p.cos_sin) && p.cos_sin_row_stride % Chunk<float>::kSize == 0;
}

}  // namespace persimmon_fast::cuda
