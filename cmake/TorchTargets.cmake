# Imported targets for the torch package at TORCH_DIR. torch's own TorchConfig.cmake is not used: with a CUDA torch
# it insists on the whole CUDA toolkit (cuBLAS, NVRTC, ...) and on its own architecture flags.
add_library(torch::cpu INTERFACE IMPORTED)
target_include_directories(torch::cpu SYSTEM INTERFACE
  ${TORCH_DIR}/include ${TORCH_DIR}/include/torch/csrc/api/include)
target_link_libraries(torch::cpu INTERFACE
  ${TORCH_DIR}/lib/libtorch.so ${TORCH_DIR}/lib/libtorch_cpu.so ${TORCH_DIR}/lib/libc10.so)

add_library(torch::python INTERFACE IMPORTED)
target_link_libraries(torch::python INTERFACE torch::cpu ${TORCH_DIR}/lib/libtorch_python.so)

if(PERSIMMON_CUDA STREQUAL "ON")
  add_library(torch::cuda INTERFACE IMPORTED)
  target_link_libraries(torch::cuda INTERFACE
    torch::cpu ${TORCH_DIR}/lib/libc10_cuda.so ${TORCH_DIR}/lib/libtorch_cuda.so)
endif()
