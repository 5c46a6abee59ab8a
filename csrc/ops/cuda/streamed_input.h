// The input of an op that takes a LayerNorm along: the kernel normalises it, or layer_norm does before.
#pragma once

#include "csrc/cuda/stream_plan.h"
#include "csrc/ops/input_norm.h"

namespace persimmon_fast {

// LayerNorm(x), or x where there is none, of inputs that have been checked.
at::Tensor normalised_cuda(const at::Tensor& x, const InputNorm& norm);

struct StreamedInput {
  at::Tensor x;
  cuda::StreamNorm norm;  // what is left to the kernel
};

// x: [num_rows, hidden_size], checked. unit: weight rows of a unit of the product that reads it (csrc/cuda/stream.cuh).
inline StreamedInput streamed_input(const at::Tensor& x, const InputNorm& norm, int64_t unit) {
  if (!norm.weight.has_value()) return {x, {}};
  if (!cuda::stream_normalises(x.size(0), x.size(1), x.element_size(), static_cast<int>(unit))) {
    return {normalised_cuda(x, norm), {}};
  }
  return {x, {norm.weight->const_data_ptr(), norm.bias->const_data_ptr(), static_cast<float>(norm.eps)}};
}

}  // namespace persimmon_fast
