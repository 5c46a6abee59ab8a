// From run-time facts to template arguments, for launchers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <driver_types.h>

#include <cstdint>
#include <type_traits>

#include "csrc/common/dtype.h"

namespace persimmon_fast::cuda {

// What a launcher returns for tensors that one launch cannot cover.
constexpr cudaError_t kTooLarge = cudaErrorNotSupported;

// body(scalar_t{}): its result.
template <typename Body>
cudaError_t dispatch_dtype(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(float{});
    case DType::kFloat16:
      return body(__half{});
    case DType::kBFloat16:
      return body(__nv_bfloat16{});
  }
  return cudaErrorInvalidValue;
}

// body(std::integral_constant<int, head_dim>{}): its result. 64 and 128; the op layer refuses others by name.
template <typename Body>
cudaError_t dispatch_head_dim(int64_t head_dim, const Body& body) {
  switch (head_dim) {
    case 64:
      return body(std::integral_constant<int, 64>{});
    case 128:
      return body(std::integral_constant<int, 128>{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace persimmon_fast::cuda
