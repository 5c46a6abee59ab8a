// The activations of a weight-streaming product (stream.cuh): at most 16 rows, as they are or normalised on the way.
//
// In shared memory, quads of 4 chunks of 16 bytes, zeros beyond k: chunk c of row r at ((c / 4) * rows + r) * 4 + c
// % 4. Lanes 4 g + t read chunk t of row g of a quad: 8 lanes then read 128 neighbouring bytes, so nothing conflicts.
#pragma once

#include "csrc/cuda/convert.cuh"
#include "csrc/cuda/layer_norm_order.cuh"
#include "csrc/cuda/stream_plan.h"

namespace persimmon_fast::cuda {

// The bits of 16 bytes of a row of `size` elements, from `column` on, with zeros behind the row. As one value: element
// by element the compiler would take registers apart.
template <typename scalar_t>
DEV uint4 read_chunk(const scalar_t* g_row, int column, int size, bool aligned) {
  uint4 bits = make_uint4(0, 0, 0, 0);
  if (aligned) {
    if (column < size) bits = *reinterpret_cast<const uint4*>(g_row + column);
  } else {
    Chunk<scalar_t> chunk = {};
#pragma unroll
    for (int i = 0; i < Chunk<scalar_t>::kSize; ++i) {
      if (column + i < size) chunk.values[i] = g_row[column + i];
    }
    bits = *reinterpret_cast<const uint4*>(&chunk);
  }
  return bits;
}

template <typename scalar_t>
struct StreamInput {
  static constexpr int kChunk = Chunk<scalar_t>::kSize;
  static constexpr int kThreads = kStreamWarps * kWarpSize;
  static constexpr int kMaxNormWarps = kLayerNormMaxThreads / kWarpSize;

  const scalar_t* x;  // [rows, k], rows row_stride elements apart
  int64_t row_stride;
  int rows;
  int k;
  bool aligned;  // every chunk of x and of the LayerNorm's parameters is whole and 16-byte aligned
  bool in_shared;
  StreamNorm norm;

  DEV int place(int row, int chunk) const { return ((chunk / 4) * rows + row) * 4 + chunk % 4; }

  // From global memory.
  DEV uint4 read(int row, int chunk) const { return read_chunk(x + row * row_stride, chunk * kChunk, k, aligned); }

  // By all threads of the block; a barrier must follow. s_sums: [2, rows, kMaxNormWarps], of which nothing is needed
  // any more when all have returned.
  DEV void stage(int num_chunks, uint4* s_x, float2* s_sums) const {
    if (norm.weight != nullptr) {
      stage_normalised(num_chunks, s_x, s_sums);
      return;
    }
    for (int row = 0; row < rows; ++row) {
#pragma unroll 2
      for (int chunk = threadIdx.x; chunk < num_chunks; chunk += kThreads) {
        s_x[place(row, chunk)] = read(row, chunk);
      }
    }
  }

 private:
  DEV static Chunk<scalar_t> elements(const uint4& bits) { return *reinterpret_cast<const Chunk<scalar_t>*>(&bits); }

  // A warp of this block does the work of warp `part` of the group of threads that layer_norm gives a row
  // (layer_norm_order.cuh), for several parts and rows one after another: two barriers for all rows together.
  DEV void stage_normalised(int num_chunks, uint4* s_x, float2* s_sums) const {
    const int lane = threadIdx.x % kWarpSize;
    const int used_chunks = ceil_div(k, kChunk);
    const LayerNormGroup group = layer_norm_group(used_chunks);
    const int num_parts = group.threads / kWarpSize;
    // body(row, part), for the parts of this warp.
    const auto for_parts = [&](auto body) {
      for (int item = threadIdx.x / kWarpSize; item < rows * num_parts; item += kStreamWarps) {
        body(item / num_parts, item % num_parts);
      }
    };
    // body(chunk, n) for the chunks of this lane in a part; n elements of it exist.
    const auto for_chunks = [&](int part, auto body) {
      for (int chunk = part * kWarpSize + lane; chunk < used_chunks; chunk += group.threads) {
        body(chunk, min(k - chunk * kChunk, kChunk));
      }
    };
    // Of the parts of a row.
    const auto row_sums = [&](const float2* s_row) {
      if (group.warp_per_row) return s_row[0];
      const float2 sums = lane < num_parts ? s_row[lane] : make_float2(0.0f, 0.0f);
      return make_float2(sum_lanes(sums.x), sum_lanes(sums.y));
    };
    float2* s_deviations = s_sums + rows * kMaxNormWarps;

    for_parts([&](int row, int part) {
      float total = 0.0f;
      for_chunks(part, [&](int chunk, int n) {
        const uint4 bits = read(row, chunk);
        s_x[place(row, chunk)] = bits;  // read again by this lane alone
        const Chunk<scalar_t> values = elements(bits);
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
          if (i < n) total += to_float(values.values[i]);
        }
      });
      total = sum_lanes(total);
      if (lane == 0) s_sums[row * kMaxNormWarps + part] = make_float2(total, 0.0f);
    });
    __syncthreads();
    for_parts([&](int row, int part) {
      const float rough_mean = row_sums(s_sums + row * kMaxNormWarps).x / k;
      float2 deviation = make_float2(0.0f, 0.0f);  // sum, sum of squares
      for_chunks(part, [&](int chunk, int n) {
        const Chunk<scalar_t> values = elements(s_x[place(row, chunk)]);
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
          if (i < n) {
            const float d = to_float(values.values[i]) - rough_mean;
            deviation.x += d;
            deviation.y = fmaf(d, d, deviation.y);
          }
        }
      });
      deviation = make_float2(sum_lanes(deviation.x), sum_lanes(deviation.y));
      if (lane == 0) s_deviations[row * kMaxNormWarps + part] = deviation;
    });
    __syncthreads();
    for_parts([&](int row, int part) {
      const float rough_mean = row_sums(s_sums + row * kMaxNormWarps).x / k;
      const float2 deviation = row_sums(s_deviations + row * kMaxNormWarps);
      const LayerNormStats stats = layer_norm_stats(rough_mean, deviation.x, deviation.y, k, norm.eps);
      for_chunks(part, [&](int chunk, int n) {
        Chunk<scalar_t> values = elements(s_x[place(row, chunk)]);
        const auto parameters = [&](const void* all) {
          return elements(read_chunk(static_cast<const scalar_t*>(all), chunk * kChunk, k, aligned));
        };
        const Chunk<scalar_t> weight = parameters(norm.weight);
        const Chunk<scalar_t> bias = parameters(norm.bias);
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {  // beyond k all stay zero
          if (i < n) {
            from_float(layer_norm_value(to_float(values.values[i]), stats, to_float(weight.values[i]),
                                        to_float(bias.values[i])),
                       values.values[i]);
          }
        }
        s_x[place(row, chunk)] = *reinterpret_cast<const uint4*>(&values);
      });
    });
    const int padding = num_chunks - used_chunks;
    for (int i = threadIdx.x; i < rows * padding; i += kThreads) {
      s_x[place(i / padding, used_chunks + i % padding)] = make_uint4(0, 0, 0, 0);
    }
  }
};

}  // namespace persimmon_fast::cuda
