// Operands of wgmma in shared memory: where a descriptor says that they lie, their values, and their product.
#pragma once

#include "csrc/emu/matrix.h"
#include "csrc/emu/tensor_map.h"

namespace emu {

constexpr int kMaxWgmmaColumns = 256;
constexpr int kMaxRegisterChanges = 8;

// Operands of the operation that executes, as numbers.
struct WgmmaOperands {
  float a[64][16];
  alignas(16) float b[16][kMaxWgmmaColumns];
};
EMU_STATE WgmmaOperands wgmma_operands;

// PTX ISA, "Matrix descriptor format". Strides in bytes.
struct WgmmaDescriptor {
  uint32_t start, leading, stride;
  Swizzle swizzle;
};
EMU_RT uint32_t descriptor_field(uint64_t bits, int at) { return static_cast<uint32_t>(bits >> at & 0x3fff) << 4; }
EMU_RT WgmmaDescriptor decode_descriptor(uint64_t bits, Site site) {
  constexpr Swizzle kModes[] = {Swizzle::kNone, Swizzle::k128, Swizzle::k64, Swizzle::k32};
  const WgmmaDescriptor descriptor{descriptor_field(bits, 0), descriptor_field(bits, 16), descriptor_field(bits, 32),
                                   kModes[bits >> 62]};
  const uint32_t pattern_row = descriptor.start >> 7 & ((1u << static_cast<int>(descriptor.swizzle)) - 1);
  EMU_CHECK((bits >> 49 & 7) == 0 && pattern_row == 0, site,
            "wgmma: the operand at shared address 0x%x does not begin where the pattern of the swizzle does (base "
            "offsets are not emulated)",
            descriptor.start);
  return descriptor;
}

// Address of 16 bytes of an operand. K-major: chunk 0 or 1 of the 16 k of row mn. MN-major: row k, `chunk` of 8 mn.
EMU_RT uint32_t chunk_address(const WgmmaDescriptor& d, bool mn_major, int row, int chunk) {
  const auto r = static_cast<uint32_t>(row), c = static_cast<uint32_t>(chunk);
  const uint32_t span = swizzle_span(d.swizzle), chunks = span / 16;
  uint32_t address = d.start;
  if (d.swizzle == Swizzle::kNone) {  // 8 x 8 matrices of 128 bytes
    address += mn_major ? c * d.stride + r / 8 * d.leading + r % 8 * 16 : r / 8 * d.stride + c * d.leading + r % 8 * 16;
  } else if (mn_major) {
    address += c / chunks * d.leading + c % chunks * 16 + r / 8 * d.stride + r % 8 * span;
  } else {
    address += r / 8 * d.stride + r % 8 * span + c * 16;
  }
  return swizzled(address, d.swizzle);
}

EMU_RT const char* operand_chunk(Block* block, uint32_t address, Site site) {
  const char* data = shared_range(block, address, 16, 16, "wgmma", site);
  if (copies_in_flight(block, data) != 0) fail_in_flight(block, "wgmma", data, site);
  return data;
}

// mn: rows of a, columns of b.
EMU_RT void touch_operand(Block* block, uint64_t bits, bool mn_major, int mn, Site site) {
  const WgmmaDescriptor descriptor = decode_descriptor(bits, site);
  const int rows = mn_major ? 16 : mn, chunks = mn_major ? mn / 8 : 2;
  for (int row = 0; row < rows; ++row) {
    for (int chunk = 0; chunk < chunks; ++chunk) {
      hb_read(operand_chunk(block, chunk_address(descriptor, mn_major, row, chunk), site), 16);
    }
  }
}

EMU_RT void read_chunk(float* to, Block* block, uint32_t address, bool is_bf16, Site site) {
  uint32_t words[4];
  __builtin_memcpy(words, operand_chunk(block, address, site), 16);
  for (int i = 0; i < 8; ++i) {
    to[i] = is_bf16 ? float_of_16_bits<true>(words[i / 2], i % 2) : float_of_16_bits<false>(words[i / 2], i % 2);
  }
}

EMU_RT void decode_a(Block* block, uint64_t bits, bool is_bf16, Site site) {
  const WgmmaDescriptor descriptor = decode_descriptor(bits, site);
  for (int row = 0; row < 64; ++row) {
    for (int chunk = 0; chunk < 2; ++chunk) {
      const uint32_t address = chunk_address(descriptor, false, row, chunk);
      read_chunk(&wgmma_operands.a[row][chunk * 8], block, address, is_bf16, site);
    }
  }
}

EMU_RT void decode_b(Block* block, uint64_t bits, bool n_major, int columns, bool is_bf16, Site site) {
  const WgmmaDescriptor descriptor = decode_descriptor(bits, site);
  const int rows = n_major ? 16 : columns, chunks = n_major ? columns / 8 : 2;
  for (int row = 0; row < rows; ++row) {
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const uint32_t address = chunk_address(descriptor, n_major, row, chunk);
      if (n_major) {
        read_chunk(&wgmma_operands.b[row][chunk * 8], block, address, is_bf16, site);
        continue;
      }
      float values[8];
      read_chunk(values, block, address, is_bf16, site);
      for (int i = 0; i < 8; ++i) wgmma_operands.b[chunk * 8 + i][row] = values[i];
    }
  }
}

// sums += a b, in the order of k; a tensor core groups and truncates otherwise. Four rows and 8 columns at a time stay
// in vector registers.
EMU_RT void multiply_operands(float (&sums)[64][kMaxWgmmaColumns], int columns) {
  typedef float Vector __attribute__((vector_size(16)));
  const WgmmaOperands& operands = wgmma_operands;
  for (int n = 0; n < columns; n += 8) {
    for (int m = 0; m < 64; m += 4) {
      Vector sum[4][2];
      for (int i = 0; i < 4; ++i) __builtin_memcpy(sum[i], &sums[m + i][n], sizeof sum[i]);
      for (int k = 0; k < 16; ++k) {
        Vector b[2];
        __builtin_memcpy(b, &operands.b[k][n], sizeof b);
        for (int i = 0; i < 4; ++i) {
          const float a = operands.a[m + i][k];
          const Vector factor = {a, a, a, a};
          sum[i][0] += factor * b[0];
          sum[i][1] += factor * b[1];
        }
      }
      for (int i = 0; i < 4; ++i) __builtin_memcpy(&sums[m + i][n], sum[i], sizeof sum[i]);
    }
  }
}

}  // namespace emu
