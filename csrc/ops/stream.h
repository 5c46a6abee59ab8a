// The op-layer half of csrc/cpu/stream.h: scratch memory, packed activations, parameters.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include "csrc/cpu/stream.h"
#include "csrc/ops/checks.h"

namespace persimmon_fast {

inline at::Tensor fp32_scratch(int64_t size) { return at::empty({size}, at::TensorOptions().dtype(at::kFloat)); }

// The rows of x (at most kMaxStreamRows, any row stride) as stream_rows reads them.
inline at::Tensor pack_activations(const at::Tensor& x) {
  const int64_t num_rows = x.size(0);
  const int64_t in_features = x.size(1);
  at::Tensor packed = fp32_scratch(cpu::packed_size(num_rows, in_features));
  cpu::PackParams p{};
  p.x = x.const_data_ptr();
  p.packed = packed.mutable_data_ptr<float>();
  p.num_rows = num_rows;
  p.in_features = in_features;
  p.x_row_stride = x.stride(0);
  p.dtype = dtype_tag(x);
  const int64_t grain = std::max<int64_t>(1, cpu::kStreamGrain / (num_rows * cpu::kPackBlock));
  at::parallel_for(0, cpu::num_pack_blocks(in_features), grain,
                   [&](int64_t begin, int64_t end) { cpu::pack_activations(p, begin, end); });
  return packed;
}

// x W^T for packed x of the dtype of W, into `out` [num_rows, out_features] fp32.
inline cpu::StreamParams stream_params(const at::Tensor& packed, int64_t num_rows, const at::Tensor& weight,
                                       const at::Tensor& out) {
  cpu::StreamParams p{};
  p.weight = weight.const_data_ptr();
  p.packed = packed.const_data_ptr<float>();
  p.out = out.mutable_data_ptr<float>();
  p.num_rows = num_rows;
  p.in_features = weight.size(1);
  p.weight_row_stride = weight.stride(0);
  p.out_row_stride = weight.size(0);
  p.dtype = dtype_tag(weight);
  return p;
}

}  // namespace persimmon_fast
