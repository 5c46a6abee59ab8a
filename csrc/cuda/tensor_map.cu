// Tensor maps: made by the CUDA driver, whose function the runtime finds; on a CPU by csrc/emu.
#include "csrc/cuda/tensor_map.h"

#include <cuda_runtime_api.h>

#ifdef PF_EMULATE
#include "csrc/emu/cuda_on_cpu.h"
#endif

namespace persimmon_fast::cuda {

bool is_encodable(const TensorBox& tensor) {
  constexpr int64_t kMaxSize = (int64_t{1} << 31) - 256;  // coordinates, of the last box too, are signed 32-bit
  constexpr int64_t kMaxStride = (int64_t{1} << 40) / 2;  // elements
  if (reinterpret_cast<uintptr_t>(tensor.base) % 16 != 0) return false;
  for (int i = 0; i < tensor.rank; ++i) {
    if (tensor.size[i] < 1 || tensor.size[i] >= kMaxSize) return false;
    if (i > 0 && (tensor.stride[i] <= 0 || tensor.stride[i] % 8 != 0 || tensor.stride[i] >= kMaxStride)) return false;
  }
  return true;
}

#ifdef PF_EMULATE

cudaError_t encode_tensor_map(const TensorBox& tensor, CUtensorMap& map) {
  emu::encode_tensor_map(tensor.base, tensor.rank, tensor.size, tensor.stride, tensor.box, map);
  return cudaSuccess;
}

#else

cudaError_t encode_tensor_map(const TensorBox& tensor, CUtensorMap& map) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
#else
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result);
#endif
    if (error != cudaSuccess || result != cudaDriverEntryPointSuccess) function = nullptr;
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  if (encode == nullptr) return cudaErrorNotSupported;
  cuuint64_t size[kMaxTensorRank];
  cuuint64_t stride_bytes[kMaxTensorRank];
  cuuint32_t box[kMaxTensorRank];
  cuuint32_t step[kMaxTensorRank];
  for (int i = 0; i < tensor.rank; ++i) {
    size[i] = static_cast<cuuint64_t>(tensor.size[i]);
    if (i > 0) stride_bytes[i - 1] = static_cast<cuuint64_t>(tensor.stride[i]) * 2;
    box[i] = static_cast<cuuint32_t>(tensor.box[i]);
    step[i] = 1;
  }
  // Elements are moved, not computed with: any 16-bit type does for fp16 and bf16.
  const CUresult result =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, static_cast<cuuint32_t>(tensor.rank), const_cast<void*>(tensor.base),
             size, stride_bytes, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

#endif

}  // namespace persimmon_fast::cuda
