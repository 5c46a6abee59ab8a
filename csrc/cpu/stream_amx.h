// stream_rows for bf16 on the AMX tile unit. For stream.cpp; the access pattern is described there.
//
//   sums [8 streams][M] fp32  +=  weights [8 streams][32 columns] bf16  x  x [16 column pairs][M][2] bf16
//
// One tile load takes a line from each of the 8 streams: its row stride is the distance between streams. The product of
// a tile takes 16 cycles whatever M is, against about 120 for its weights to arrive: 16 rows stream nearly as fast
// as 1. bf16 products are exact in fp32; sums are fp32, rounded to nearest even, subnormal numbers count as zero.
#pragma once

#include <cstdint>
#include <cstring>

#include "csrc/cpu/amx.h"
#include "csrc/cpu/stream.h"

namespace persimmon_fast::cpu::PF_ISA {
namespace amx {

constexpr int kStreams = 8;
constexpr int64_t kColumns = 32;  // of one tile of weights: a cache line
constexpr int64_t kPrefetchBytes = 2048;

// tmm0: sums, tmm1: weights, tmm2: x.
inline void configure_tiles(int num_streams, int64_t num_rows) {
  TileConfig config;
  config.set(0, num_streams, static_cast<int>(num_rows * sizeof(float)));
  config.set(1, num_streams, kColumns * sizeof(bf16));
  config.set(2, kColumns / 2, static_cast<int>(num_rows * sizeof(float)));
  configure(config);
}

// Sums of one row of each stream, row s at weight + s * stream_stride, to out[m * out_row_stride + s * out_step].
inline void multiply_streams(const StreamParams& p, const bf16* weight, int num_streams, int64_t stream_stride,
                             float* out, int64_t out_step) {
  const bf16* x = reinterpret_cast<const bf16*>(p.packed);
  const int64_t x_stride_bytes = p.num_rows * static_cast<int64_t>(sizeof(float));
  zero<0>();
  int64_t k = 0;
  for (; k + kColumns <= p.in_features; k += kColumns) {
    for (int s = 0; s < num_streams; ++s) {
      __builtin_prefetch(reinterpret_cast<const char*>(weight + s * stream_stride + k) + kPrefetchBytes);
    }
    load<2>(x + k * p.num_rows, x_stride_bytes);
    load<1>(weight + k, stream_stride * static_cast<int64_t>(sizeof(bf16)));
    multiply_add<0, 1, 2>();
  }
  if (k < p.in_features) {
    alignas(64) bf16 tail[kStreams][kColumns] = {};
    for (int s = 0; s < num_streams; ++s) {
      std::memcpy(tail[s], weight + s * stream_stride + k, (p.in_features - k) * sizeof(bf16));
    }
    load<2>(x + k * p.num_rows, x_stride_bytes);
    load<1>(tail[0], sizeof(tail[0]));
    multiply_add<0, 1, 2>();
  }
  alignas(64) float sums[kStreams * kMaxStreamRows];
  store<0>(sums, x_stride_bytes);
  for (int s = 0; s < num_streams; ++s) {
    for (int64_t m = 0; m < p.num_rows; ++m) out[m * p.out_row_stride + s * out_step] = sums[s * p.num_rows + m];
  }
}

inline void stream_rows(const StreamParams& p, int64_t begin, int64_t end) {
  const bf16* weight = static_cast<const bf16*>(p.weight);
  const int64_t len = (end - begin) / kStreams;
  const int64_t rest = begin + len * kStreams;
  configure_tiles(kStreams, p.num_rows);
  for (int64_t row = begin; row < begin + len; ++row) {
    multiply_streams(p, weight + row * p.weight_row_stride, kStreams, len * p.weight_row_stride, p.out + row, len);
  }
  if (rest < end) {
    const int num_left = static_cast<int>(end - rest);
    configure_tiles(num_left, p.num_rows);
    multiply_streams(p, weight + rest * p.weight_row_stride, num_left, p.weight_row_stride, p.out + rest, 1);
  }
  release();
}

// Columns [begin, end) of x as [in_features / 2][num_rows][2], zero from in_features to the end of its tile.
inline void pack(const PackParams& p, int64_t begin, int64_t end) {
  bf16* packed = reinterpret_cast<bf16*>(p.packed);
  const bf16* x = static_cast<const bf16*>(p.x);
  for (int64_t m = 0; m < p.num_rows; ++m) {
    for (int64_t k = begin; k < end; k += 2) {
      bf16 pair[2] = {};
      if (k + 1 < p.in_features) {
        std::memcpy(pair, x + m * p.x_row_stride + k, sizeof(pair));
      } else if (k < p.in_features) {
        pair[0] = x[m * p.x_row_stride + k];
      }
      std::memcpy(packed + k * p.num_rows + m * 2, pair, sizeof(pair));
    }
  }
}

}  // namespace amx
}  // namespace persimmon_fast::cpu::PF_ISA
