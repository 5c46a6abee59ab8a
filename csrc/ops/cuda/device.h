// What the op layer of the CUDA kernels needs of its device. Compiled twice: into _C, where the ops take CUDA tensors,
// and with PF_EMULATE into persimmon_fast_emu, where they take CPU tensors and csrc/emu runs the kernels.
#pragma once

#ifdef PF_EMULATE

#include <c10/util/Exception.h>
#include <driver_types.h>
#include <torch/library.h>

#define PF_CUDA_LIBRARY_IMPL(m) TORCH_LIBRARY_IMPL(persimmon_fast_emu, CPU, m)

namespace persimmon_fast {

struct DeviceGuard {
  explicit DeviceGuard(c10::Device) {}
};
inline cudaStream_t current_stream() { return nullptr; }
inline int num_multiprocessors() { return 8; }  // few, so that small tests give every multiprocessor several blocks

}  // namespace persimmon_fast

#else

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <atomic>

#define PF_CUDA_LIBRARY_IMPL(m) TORCH_LIBRARY_IMPL(persimmon_fast, CUDA, m)

namespace persimmon_fast {

// Does nothing for a CPU tensor among CUDA tensors: the op's checks, which follow, refuse it by name.
struct DeviceGuard {
  explicit DeviceGuard(c10::Device device) {
    if (device.is_cuda()) guard.set_device(device);
  }
  c10::cuda::OptionalCUDAGuard guard;
};
inline cudaStream_t current_stream() { return c10::cuda::getCurrentCUDAStream(); }

// Of the current device; asked once per device.
inline int num_multiprocessors() {
  constexpr int kMaxDevices = 64;
  static std::atomic<int> counts[kMaxDevices] = {};
  const int device = c10::cuda::current_device();
  TORCH_CHECK(device < kMaxDevices, "persimmon_fast takes at most ", kMaxDevices, " CUDA devices");
  int count = counts[device];
  if (count == 0) {
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
    counts[device] = count;
  }
  return count;
}

}  // namespace persimmon_fast

#endif

#include "csrc/cuda/dispatch.h"

namespace persimmon_fast {

// Of what a launcher returned.
inline void check_launch(const char* op, cudaError_t error) {
  TORCH_CHECK_VALUE(
      error != cuda::kTooLarge, op,
      ": the tensors are too large for one launch (2^31 - 1 thread blocks): call it for parts of the rows");
#ifdef PF_EMULATE
  TORCH_CHECK(error == cudaSuccess, op, ": the launch was refused");
#else
  C10_CUDA_CHECK(error);
#endif
}

inline void check_head_dim_cuda(const char* op, int64_t head_dim) {
  TORCH_CHECK_VALUE(head_dim == 64 || head_dim == 128, op, ": head_dim must be 64 or 128 on CUDA, got ", head_dim);
}

}  // namespace persimmon_fast
