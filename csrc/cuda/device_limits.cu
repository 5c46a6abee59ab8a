// What the current device allows a launch; the emulated one is an RTX 4090 that launches dependents.
#include "csrc/cuda/device_limits.h"

#include "csrc/cuda/device.cuh"

#ifndef PF_EMULATE
#include <atomic>
#endif

namespace persimmon_fast::cuda {

#ifdef PF_EMULATE

cudaError_t device_limits(DeviceLimits& limits) {
  limits = {kMaxSmemBytes, kMaxSmemBytes + 1024, true};
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
  const struct {
    int* value;
    cudaDeviceAttr attribute;
  } questions[] = {{&per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin},
                   {&per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor},
                   {&major, cudaDevAttrComputeCapabilityMajor}};
  for (const auto& question : questions) {
    const cudaError_t error = cudaDeviceGetAttribute(question.value, question.attribute, device);
    if (error != cudaSuccess) return error;
  }
  int driver = 0;
  if (const cudaError_t error = cudaDriverGetVersion(&driver); error != cudaSuccess) return error;
  constexpr int kFirstThatCaptures = 12030;  // dependent launches into a graph
  limits = {static_cast<size_t>(per_block), static_cast<size_t>(per_multiprocessor),
            major >= 9 && driver >= kFirstThatCaptures};
  if (has_place) {  // threads that ask at the same time write the same
    known[device] = limits;
    is_known[device].store(true, std::memory_order_release);
  }
  return cudaSuccess;
}

#endif

}  // namespace persimmon_fast::cuda
