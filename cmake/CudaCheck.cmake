# Target cuda_check: everything for CUDA compiles, whether or not it is part of the extension. It
# needs nvcc but neither a GPU nor a CUDA build of torch, and links nothing.
#   - all kernels, for STATEFUL_KV_CUDA_ARCHS
#   - the CUDA ops, without linking, where STATEFUL_KV_TORCH_DIR names a torch of any kind
# Include it from the top directory, after csrc/ops.
include_guard(GLOBAL)
include(${PROJECT_SOURCE_DIR}/cmake/CudaToolkit.cmake)
include(${PROJECT_SOURCE_DIR}/cmake/Instantiate.cmake)

if(TARGET skv_cuda)
  # A real CUDA build compiles the same files anyway.
  add_custom_target(cuda_check DEPENDS skv_cuda stateful_kv_ops)
  return()
endif()
string(TOUPPER "${STATEFUL_KV_CUDA}" skv_cuda_choice)
if(skv_cuda_choice STREQUAL "OFF")
  return()
endif()
skv_find_cuda_compiler()
if(NOT SKV_CUDA_COMPILER_FOUND)
  message(STATUS "stateful_kv: no CUDA compiler found, so there is no target cuda_check")
  return()
endif()
skv_enable_cuda()

file(GLOB skv_cuda_sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/csrc/kernels/cuda/*.cu)
skv_instantiate_kernels(skv_instantiated_sources)
add_library(skv_cuda_check OBJECT EXCLUDE_FROM_ALL
  ${skv_cuda_sources} ${skv_instantiated_sources})
skv_configure_cuda_target(skv_cuda_check)
# What each kernel needs, kept beside its object for scripts/checks/cuda_report.py.
target_compile_options(skv_cuda_check PRIVATE -Xptxas=-v)
set_target_properties(skv_cuda_check PROPERTIES
  CUDA_COMPILER_LAUNCHER "${PROJECT_SOURCE_DIR}/scripts/checks/keep_ptxas_log.sh")
add_custom_target(cuda_check DEPENDS skv_cuda_check)

if(NOT EXISTS "${STATEFUL_KV_TORCH_DIR}/include/torch/library.h")
  message(STATUS "stateful_kv: cuda_check leaves out the ops: STATEFUL_KV_TORCH_DIR is not set")
  return()
endif()
# A CPU build of torch has the c10/cuda headers but for this one, which its CUDA build generates.
set(skv_cuda_stand_in ${PROJECT_BINARY_DIR}/cuda_check_include)
if(NOT EXISTS "${STATEFUL_KV_TORCH_DIR}/include/c10/cuda/impl/cuda_cmake_macros.h")
  file(CONFIGURE OUTPUT ${skv_cuda_stand_in}/c10/cuda/impl/cuda_cmake_macros.h
    CONTENT "#pragma once\n#define C10_CUDA_BUILD_SHARED_LIBS\n")
endif()
file(GLOB skv_cuda_ops CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/csrc/ops/*/cuda.cpp)
add_library(skv_cuda_ops_check OBJECT EXCLUDE_FROM_ALL ${skv_cuda_ops})
target_include_directories(skv_cuda_ops_check PRIVATE ${PROJECT_SOURCE_DIR})
target_include_directories(skv_cuda_ops_check SYSTEM PRIVATE
  ${skv_cuda_stand_in}
  ${STATEFUL_KV_TORCH_DIR}/include
  ${STATEFUL_KV_TORCH_DIR}/include/torch/csrc/api/include
  ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
target_compile_definitions(skv_cuda_ops_check PRIVATE SKV_WITH_CUDA)
# The objects are thrown away: no optimisation.
target_compile_options(skv_cuda_ops_check PRIVATE -Wall -Wextra -O0)
if(STATEFUL_KV_WERROR)
  target_compile_options(skv_cuda_ops_check PRIVATE -Werror)
endif()
add_dependencies(cuda_check skv_cuda_ops_check)
