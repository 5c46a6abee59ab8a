// The scale of fp16 squares: what both second products of squared_relu_mlp do with a row's largest activation.
//
// With E the exponent of the row's largest value, e = E - 7 within -15 .. 8, so that 128 <= largest 2^-e < 256: no
// square overflows and the largest ones keep all bits (docs/kernels/squared_relu_mlp.md).
#pragma once

#include "csrc/cuda/device.cuh"

namespace persimmon_fast::cuda {

// e + 22 for the row whose largest value has these fp16 bits: its exponent field, within what e may be. Of an inf or
// NaN that of the largest finite value: the others in its row stay finite.
DEV int exponent_field(uint32_t largest_bits) { return min(max(static_cast<int>(largest_bits >> 10), 7), 30); }

// 2^-e as two fp16 numbers: their exponent field is 15 - e.
DEV uint32_t square_factor(uint32_t largest_bits) {
  return static_cast<uint32_t>(15 + 22 - exponent_field(largest_bits)) * 0x04000400u;
}

// 2^2e
DEV float square_unscale(uint32_t largest_bits) { return ldexpf(1.0f, 2 * (exponent_field(largest_bits) - 22)); }

// (pair * factor)^2 of two fp16 numbers each.
DEV uint32_t scaled_squares(uint32_t pair, uint32_t factor) {
  const __half2 scaled = __hmul2(*reinterpret_cast<const __half2*>(&pair), *reinterpret_cast<const __half2*>(&factor));
  const __half2 squares = __hmul2(scaled, scaled);
  return *reinterpret_cast<const uint32_t*>(&squares);
}

}  // namespace persimmon_fast::cuda
