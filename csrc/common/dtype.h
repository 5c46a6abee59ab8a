// The run-time dtype of a tensor, for parameter structs that CPU and CUDA kernels share.
#pragma once

namespace persimmon_fast {

enum class DType { kFloat32, kFloat16, kBFloat16 };

}  // namespace persimmon_fast
