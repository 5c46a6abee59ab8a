// The frame of a kernel for sm_90a that tests the emulator: as CASE, with tensor maps and the blocks of a cluster.
#pragma once

#include "csrc/cuda/wgmma.cuh"
#include "tests/emu/test_kernel.h"

namespace ptx = persimmon_fast::cuda::ptx;

struct Sm90Args : Args {
  CUtensorMap a, b;
};

// maps(args): fills args.a and args.b before the launch.
#define SM90_CASE(name, maps, grid, block, cluster_size, dynamic_bytes)                     \
  static void name(const Sm90Args args);                                                    \
  static const Registration name##_registration(#name, [](const Args& plain) {              \
    Sm90Args args{};                                                                        \
    static_cast<Args&>(args) = plain;                                                       \
    maps(args);                                                                             \
    emu::launch_cluster_named(#name, name, grid, block, cluster_size, dynamic_bytes, args); \
  });                                                                                       \
  static void name([[maybe_unused]] const Sm90Args args)

inline void no_maps(Sm90Args&) {}

// A matrix of 16-bit elements, with boxes of box_rows rows and 64 columns.
inline CUtensorMap map_matrix(const void* base, int64_t rows, int64_t columns, int box_rows) {
  const int64_t size[] = {columns, rows}, stride[] = {1, columns};
  const int box[] = {64, box_rows};
  CUtensorMap map;
  emu::encode_tensor_map(base, 2, size, stride, box, map);
  return map;
}
