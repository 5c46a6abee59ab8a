// The multiplication of a weight-streaming product (stream.cuh): what a warp keeps of 16 weight rows, lane 4 g + t.
#pragma once

#include "csrc/cuda/ptx.cuh"
#include "csrc/cuda/stream_input.cuh"

namespace persimmon_fast::cuda {

// What a lane holds of a step: chunks t and t + 4 of weight rows g and g + 8.
using StreamWeights = uint4[2][2];  // [row half][chunk half]

// 16-bit types, on tensor cores: x is A, W is B of mma.m16n8k16. Both permute k alike: elements 0 to 3 of the chunks of
// four lanes t are the 16 k of one mma, elements 4 to 7 of the next.
template <typename scalar_t>
struct StreamSums {
  float sums[2][4] = {};  // [row half]: token g of weight rows 2 t, 2 t + 1; token g + 8 of the same
  uint4 x[2][2] = {};     // [chunk half]: tokens g, g + 8

  DEV void load(const StreamInput<scalar_t>& input, const uint4* s_x, int first_chunk) {
    const int lane = threadIdx.x % kWarpSize;
    const auto for_fragments = [&](auto read) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int high = 0; high < 2; ++high) {
          const int token = lane / 4 + high * 8;
          if (token < input.rows) x[j][high] = read(token, first_chunk + j * 4 + lane % 4);
        }
      }
    };
    if (input.in_shared) {  // one branch for all four
      for_fragments([&](int token, int chunk) { return s_x[input.place(token, chunk)]; });
    } else {
      for_fragments([&](int token, int chunk) { return input.read(token, chunk); });
    }
  }

  DEV void add(const StreamInput<scalar_t>&, const uint4*, int, const StreamWeights& weights) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const uint32_t first[4] = {x[j][0].x, x[j][1].x, x[j][0].y, x[j][1].y};
      const uint32_t second[4] = {x[j][0].z, x[j][1].z, x[j][0].w, x[j][1].w};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint4& w = weights[half][j];
        const uint32_t b[2][2] = {{w.x, w.y}, {w.z, w.w}};
        ptx::mma(sums[half], first, b[0], scalar_t{});
        ptx::mma(sums[half], second, b[1], scalar_t{});
      }
    }
  }

  // s_partial: [rows, kStreamGroup], of this warp.
  DEV void store(int rows, float* s_partial) const {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int high = 0; high < 2; ++high) {
        const int token = lane / 4 + high * 8;
        if (token >= rows) continue;
        *reinterpret_cast<float2*>(s_partial + token * kStreamGroup + half * 8 + lane % 4 * 2) =
            make_float2(sums[half][high * 2], sums[half][high * 2 + 1]);
      }
    }
  }
};

// fp32, on the CUDA cores: tensor cores would round to TF32.
template <>
struct StreamSums<float> {
  float sums[2][kStreamMaxRows] = {};  // [row half]: weight row g of every token, over the chunks of this lane

  DEV void load(const StreamInput<float>&, const uint4*, int) {}

  DEV void add(const StreamInput<float>& input, const uint4* s_x, int first_chunk, const StreamWeights& weights) {
#pragma unroll
    for (int token = 0; token < kStreamMaxRows; ++token) {
      if (token >= input.rows) break;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int chunk = first_chunk + j * 4 + static_cast<int>(threadIdx.x) % 4;
        const uint4 bits = input.in_shared ? s_x[input.place(token, chunk)] : input.read(token, chunk);
        const auto& x = reinterpret_cast<const float (&)[4]>(bits);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            sums[half][token] =
                fmaf(x[i], reinterpret_cast<const float (&)[4]>(weights[half][j])[i], sums[half][token]);
          }
        }
      }
    }
  }

  DEV void store(int rows, float* s_partial) const {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int token = 0; token < kStreamMaxRows; ++token) {
      if (token >= rows) break;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float sum = sum_lanes<4>(sums[half][token]);
        if (lane % 4 == token % 4) s_partial[token * kStreamGroup + half * 8 + lane / 4] = sum;
      }
    }
  }
};

}  // namespace persimmon_fast::cuda
