# CUDA kernels: csrc/cuda/*.cu, which see no torch header. Included when PERSIMMON_CUDA is ON or KERNELS;
# CMAKE_CUDA_ARCHITECTURES comes from setup.py.
if(NOT CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 80-real 90a-real 90-virtual)
endif()
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)

file(GLOB PF_CUDA_KERNELS CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/csrc/cuda/*.cu)
add_library(pf_cuda OBJECT ${PF_CUDA_KERNELS})
target_include_directories(pf_cuda PRIVATE ${CMAKE_SOURCE_DIR})
# -fmad=false: a*b+c is one rounding only where the source says fma(), as in the CPU kernels and the emulator
# -Xptxas -v: registers, shared memory and spills of every kernel appear in the build's output
target_compile_options(pf_cuda PRIVATE --expt-relaxed-constexpr -fmad=false -lineinfo --threads=0 -Xptxas=-v
  -Xcompiler=-Wall,-Wextra)
# Kernels with wgmma and TMA are empty but for 9.0a. Whether they may be launched: csrc/cuda/device_limits.h
if("90a-real" IN_LIST CMAKE_CUDA_ARCHITECTURES)
  target_compile_definitions(pf_cuda PRIVATE PF_BUILT_SM90A)
endif()

if(PERSIMMON_CUDA STREQUAL "KERNELS")
  add_library(pf_cuda_check SHARED $<TARGET_OBJECTS:pf_cuda>)
  set_target_properties(pf_cuda_check PROPERTIES LINKER_LANGUAGE CUDA)
  target_link_options(pf_cuda_check PRIVATE -Wl,--no-undefined)
else()
  target_sources(_C PRIVATE $<TARGET_OBJECTS:pf_cuda>)
  target_link_libraries(_C PRIVATE torch::cuda CUDA::cudart)
endif()
