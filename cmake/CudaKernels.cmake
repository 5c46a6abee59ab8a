# CUDA kernels: csrc/cuda/*.cu, which see no torch header. Included when PERSIMMON_CUDA is ON or KERNELS;
# CMAKE_CUDA_ARCHITECTURES comes from setup.py.
if(NOT CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 80-real 90a-real 90-virtual)
endif()
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)

file(GLOB PF_CUDA_KERNELS CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/csrc/cuda/*.cu)
set(PF_SM90A_KERNELS ${PF_CUDA_KERNELS})
list(FILTER PF_SM90A_KERNELS INCLUDE REGEX "_sm90\\.cu$")
list(REMOVE_ITEM PF_CUDA_KERNELS ${PF_SM90A_KERNELS})

add_library(pf_cuda OBJECT ${PF_CUDA_KERNELS})
set(PF_CUDA_LIBRARIES pf_cuda)
# *_sm90.cu holds what only sm_90a can run; PF_BUILT_SM90A tells the others that it is there.
if("90a-real" IN_LIST CMAKE_CUDA_ARCHITECTURES)
  add_library(pf_cuda_sm90 OBJECT ${PF_SM90A_KERNELS})
  set_target_properties(pf_cuda_sm90 PROPERTIES CUDA_ARCHITECTURES 90a-real)
  list(APPEND PF_CUDA_LIBRARIES pf_cuda_sm90)
endif()
foreach(library IN LISTS PF_CUDA_LIBRARIES)
  target_include_directories(${library} PRIVATE ${CMAKE_SOURCE_DIR})
  # -fmad=false: a*b+c is one rounding only where the source says fma(), as in the CPU kernels and the emulator
  # -Xptxas -v: registers, shared memory and spills of every kernel appear in the build's output
  target_compile_options(${library} PRIVATE --expt-relaxed-constexpr -fmad=false -lineinfo --threads=0 -Xptxas=-v
    -Xcompiler=-Wall,-Wextra)
  if(TARGET pf_cuda_sm90)
    target_compile_definitions(${library} PRIVATE PF_BUILT_SM90A)
  endif()
  list(APPEND PF_CUDA_OBJECTS $<TARGET_OBJECTS:${library}>)
endforeach()

if(PERSIMMON_CUDA STREQUAL "KERNELS")
  add_library(pf_cuda_check SHARED ${PF_CUDA_OBJECTS})
  set_target_properties(pf_cuda_check PROPERTIES LINKER_LANGUAGE CUDA)
  target_link_options(pf_cuda_check PRIVATE -Wl,--no-undefined)
else()
  target_sources(_C PRIVATE ${PF_CUDA_OBJECTS})
  target_link_libraries(_C PRIVATE torch::cuda CUDA::cudart)
endif()
