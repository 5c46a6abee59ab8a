// Weight streaming: products of a large matrix with at most 16 rows of activations, at the speed of memory.
//
// Used by every kernel that reads a whole weight matrix for a few tokens: linear_residual, qkv_norm_rope,
// squared_relu_mlp, lm_head. A product has two steps:
//
//   1. pack_activations, once: x in the type (fp32; bf16 for AMX) and order in which stream_rows reads it;
//   2. stream_rows, by every thread for its range of weight rows: fp32 sums to scratch memory, in which the kernel
//      then does its epilogue.
//
// See stream.cpp for the access pattern.
#pragma once

#include <cstdint>

#include "csrc/common/types.h"
#include "csrc/cpu/isa.h"

namespace persimmon_fast::cpu {

constexpr int64_t kMaxStreamRows = 16;   // rows of x that one pass over the weights serves
constexpr int64_t kPackBlock = 32;       // columns of x in one work item of pack_activations
constexpr int64_t kStreamGrain = 65536;  // weights per thread that pay for waking it

// Number of blocks that hold in_features columns, and of floats in the packed activations.
constexpr int64_t num_pack_blocks(int64_t in_features) { return (in_features + kPackBlock - 1) / kPackBlock; }
constexpr int64_t packed_size(int64_t num_rows, int64_t in_features) {
  return num_rows * num_pack_blocks(in_features) * kPackBlock;
}
// Weight rows per task of at::parallel_for.
constexpr int64_t stream_grain(int64_t in_features) {
  return in_features < kStreamGrain ? kStreamGrain / (in_features > 0 ? in_features : 1) : 1;
}

struct PackParams {
  const void* x;     // [num_rows, in_features], rows x_row_stride elements apart
  float* packed;     // [packed_size(num_rows, in_features)], for stream_rows of the same instruction set
  int64_t num_rows;  // 1 .. kMaxStreamRows
  int64_t in_features;
  int64_t x_row_stride;
  DType dtype;  // of x
};

// Work items: blocks of kPackBlock columns, num_pack_blocks(in_features) of them.
PF_CPU_KERNEL(pack_activations, PackParams)

struct StreamParams {
  const void* weight;   // [out_features, in_features], rows weight_row_stride elements apart
  const float* packed;  // written by pack_activations
  float* out;           // [num_rows, out_features] fp32, rows out_row_stride elements apart: x W^T
  int64_t num_rows;     // of x and out, 1 .. kMaxStreamRows
  int64_t in_features;
  int64_t weight_row_stride;
  int64_t out_row_stride;
  DType dtype;     // of weight
  bool x_is_fp32;  // pack_activations had fp32 where the weights are narrower
};

// Work items: weight rows; writes out[:, begin:end]. Kernels call PF_ISA::stream_rows, the copy of their own
// instruction set. The sum of one (row, weight row) pair does not depend on num_rows, begin or end: a row of a batch
// has the bits that it has alone, with any number of threads.
PF_CPU_KERNEL(stream_rows, StreamParams)

}  // namespace persimmon_fast::cpu
