// Tensor maps: what cuTensorMapEncodeTiled would put into the opaque 128 bytes, in a form of our own.
#pragma once

#include <cuda.h>

#include "csrc/emu/shared_memory.h"

namespace emu {

constexpr uint64_t kTensorMapMagic = 0x70616d2d726f736eu;
constexpr int kMaxBoxSize = 256;  // elements of a dimension
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));

// Bytes of a row that the swizzle permutes.
EMU_RT uint32_t swizzle_span(Swizzle swizzle) { return 16u << static_cast<int>(swizzle); }

// Where the byte at `address` of shared memory lies: bits 4 to 6 (5, 4) of the address are changed by those from 7 on.
EMU_RT uint32_t swizzled(uint32_t address, Swizzle swizzle) {
  const uint32_t mask = (1u << static_cast<int>(swizzle)) - 1;
  return address ^ (address >> 7 & mask) << 4;
}

// Describes a tensor of 16-bit elements and the box that one copy moves: sizes and strides in elements, dimension 0
// dense. Throws where the driver would refuse.
inline void encode_tensor_map(const void* base, int rank, const int64_t* size, const int64_t* stride, const int* box,
                              CUtensorMap& encoded, Swizzle swizzle = Swizzle::k128) {
  const auto check = [](bool condition, const std::string& text) {
    if (!condition) throw std::invalid_argument("emulator: tensor map: " + text);
  };
  check(rank >= 1 && rank <= 5, "rank must be 1 to 5, got " + std::to_string(rank));
  check(reinterpret_cast<uintptr_t>(base) % 16 == 0, "base must be 16-byte aligned");
  TensorMap map{};
  map.magic = kTensorMapMagic;
  map.base = static_cast<const char*>(base);
  map.rank = rank;
  map.swizzle = swizzle;
  for (int i = 0; i < rank; ++i) {
    const std::string dimension = " of dimension " + std::to_string(i);
    check(size[i] >= 1 && size[i] <= int64_t{1} << 32, "size" + dimension + " is " + std::to_string(size[i]));
    check(i == 0 || (stride[i] > 0 && stride[i] % 8 == 0 && stride[i] < int64_t{1} << 39),
          "stride" + dimension + " must be a positive multiple of 8 elements, got " + std::to_string(stride[i]));
    check(box[i] >= 1 && box[i] <= kMaxBoxSize, "box" + dimension + " must be 1 to 256, got " + std::to_string(box[i]));
    map.size[i] = size[i];
    map.stride[i] = i == 0 ? 1 : stride[i];
    map.box[i] = box[i];
  }
  check(box[0] % 8 == 0, "a row of the box must be a multiple of 16 bytes, got " + std::to_string(box[0] * 2));
  check(swizzle == Swizzle::kNone || static_cast<uint32_t>(box[0]) * 2 <= swizzle_span(swizzle),
        "a row of the box, " + std::to_string(box[0] * 2) + " bytes, is wider than the swizzle");
  encoded = CUtensorMap{};
  std::memcpy(&encoded, &map, sizeof map);
}

// Row `index` of a box, rows counted through dimensions 1, 2, ..: where column 0 of the box lies in memory, and which
// columns lie inside the tensor.
struct BoxRow {
  const char* data;
  int begin, end;
};
EMU_RT BoxRow box_row(const TensorMap& map, const int32_t* at, uint32_t index) {
  const int64_t columns = map.box[0];
  int64_t begin = at[0] < 0 ? -int64_t{at[0]} : 0, end = map.size[0] - at[0];
  if (end > columns) end = columns;
  int64_t offset = at[0];
  for (int i = 1; i < map.rank; ++i) {
    const auto box = static_cast<uint32_t>(map.box[i]);
    const int64_t coordinate = at[i] + int64_t{index % box};
    index /= box;
    if (coordinate < 0 || coordinate >= map.size[i]) end = 0;
    offset += coordinate * map.stride[i];
  }
  if (begin >= end) begin = end = 0;
  return {map.base + offset * 2, static_cast<int>(begin), static_cast<int>(end)};
}
EMU_RT uint32_t num_box_rows(const TensorMap& map) {
  uint32_t rows = 1;
  for (int i = 1; i < map.rank; ++i) rows *= static_cast<uint32_t>(map.box[i]);
  return rows;
}

}  // namespace emu
