// What the current device allows a launch; the emulated one is an H100, or an RTX 4090 that launches dependents.
#include "csrc/cuda/device_limits.h"

#include "csrc/cuda/device.cuh"
#include "csrc/cuda/launch_sm90.cuh"

#ifndef PF_EMULATE
#include <atomic>
#endif

namespace persimmon_fast::cuda {

#ifdef PF_EMULATE

cudaError_t device_limits(DeviceLimits& limits) {
  const bool is_sm90 = emu::config().architecture == 90;
  const size_t smem_bytes = is_sm90 ? kMaxSmemBytesSm90 : kMaxSmemBytes;
  limits = {smem_bytes, smem_bytes + 1024, true, is_sm90};
  return cudaSuccess;
}

#else

cudaError_t device_limits(DeviceLimits& limits) {
  constexpr int kMaxDevices = 64;
  static DeviceLimits known[kMaxDevices];
  static std::atomic<bool> is_known[kMaxDevices];
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  const bool has_place = device < kMaxDevices;
  if (has_place && is_known[device].load(std::memory_order_acquire)) {
    limits = known[device];
    return cudaSuccess;
  }
  int per_block = 0;
  int per_multiprocessor = 0;
  int major = 0;
  int minor = 0;
  const struct {
    int* value;
    cudaDeviceAttr attribute;
  } questions[] = {{&per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin},
                   {&per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor},
                   {&major, cudaDevAttrComputeCapabilityMajor},
                   {&minor, cudaDevAttrComputeCapabilityMinor}};
  for (const auto& question : questions) {
    const cudaError_t error = cudaDeviceGetAttribute(question.value, question.attribute, device);
    if (error != cudaSuccess) return error;
  }
  int driver = 0;
  if (const cudaError_t error = cudaDriverGetVersion(&driver); error != cudaSuccess) return error;
  constexpr int kFirstThatCaptures = 12030;  // dependent launches into a graph
  limits = {static_cast<size_t>(per_block), static_cast<size_t>(per_multiprocessor),
            major >= 9 && driver >= kFirstThatCaptures, kBuiltSm90a && major == 9 && minor == 0};
  if (has_place) {  // threads that ask at the same time write the same
    known[device] = limits;
    is_known[device].store(true, std::memory_order_release);
  }
  return cudaSuccess;
}

#endif

}  // namespace persimmon_fast::cuda
