// Storage types of the CPU kernels, and the switch from a run-time dtype to one of them. Torch-free; layouts equal
// c10's.
#pragma once

#include <cstdint>
#include <cstring>

#include "csrc/common/dtype.h"

namespace persimmon_fast {

using fp16 = _Float16;

// bfloat16: the upper half of a float. Conversion from float rounds to nearest even and keeps NaN.
struct bf16 {
  uint16_t bits;

  bf16() = default;
  explicit bf16(float value) {
    uint32_t word;
    std::memcpy(&word, &value, sizeof(word));
    const bool is_nan = (word & 0x7fffffffu) > 0x7f800000u;
    bits = is_nan ? static_cast<uint16_t>((word >> 16) | 0x0040u)
                  : static_cast<uint16_t>((word + 0x7fffu + ((word >> 16) & 1u)) >> 16);
  }
  explicit operator float() const {
    const uint32_t word = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &word, sizeof(value));
    return value;
  }
};

// Calls body(T{}) with the C++ type of `dtype`: the one place where a run-time dtype becomes a type.
template <typename Body>
inline void dispatch_dtype(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(float{});
    case DType::kFloat16:
      return body(fp16{});
    case DType::kBFloat16:
      return body(bf16{});
  }
}

}  // namespace persimmon_fast
