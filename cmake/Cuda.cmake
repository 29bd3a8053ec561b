# The CUDA half of the extension. Included by csrc/ops, where STATEFUL_KV_TORCH_DIR is known.
#   in:  STATEFUL_KV_CUDA (AUTO|ON|OFF), STATEFUL_KV_CUDA_ARCHS, STATEFUL_KV_TORCH_DIR
#   out: SKV_CUDA_ENABLED; if true the target skv_cuda (kernels, CUDA headers, c10_cuda) and
#        SKV_CUDA_ARCHS_TEXT, the architectures joined by commas for a compile definition
# AUTO = ON if torch was built with CUDA and CMake finds a CUDA compiler. Whether a GPU is visible
# plays no part: a login node may build for a compute node.
include_guard(DIRECTORY)
include(${PROJECT_SOURCE_DIR}/cmake/CudaToolkit.cmake)
include(${PROJECT_SOURCE_DIR}/cmake/Instantiate.cmake)
option(STATEFUL_KV_CUDA_ASSERTS "Check ids in device memory inside the CUDA kernels" OFF)

set(SKV_CUDA_ENABLED FALSE)
string(TOUPPER "${STATEFUL_KV_CUDA}" skv_cuda_choice)
if(NOT skv_cuda_choice MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "STATEFUL_KV_CUDA: expected AUTO, ON or OFF, got '${STATEFUL_KV_CUDA}'")
endif()

if(NOT skv_cuda_choice STREQUAL "OFF")
  # A line of torch/version.py: cuda: str | None = '13.0', or None for a CPU build of torch.
  file(STRINGS "${STATEFUL_KV_TORCH_DIR}/version.py" skv_torch_cuda_line REGEX "^cuda[ :=]")
  set(skv_torch_cuda "")
  if(skv_torch_cuda_line MATCHES "= *['\"]([0-9]+)\\.([0-9]+)")
    set(skv_torch_cuda_major "${CMAKE_MATCH_1}")
    set(skv_torch_cuda "${CMAKE_MATCH_1}.${CMAKE_MATCH_2}")
  endif()

  set(skv_cuda_obstacle "")
  if(NOT skv_torch_cuda)
    set(skv_cuda_obstacle "the torch in ${STATEFUL_KV_TORCH_DIR} was built without CUDA")
  elseif(NOT EXISTS "${STATEFUL_KV_TORCH_DIR}/lib/libc10_cuda.so")
    set(skv_cuda_obstacle "${STATEFUL_KV_TORCH_DIR}/lib has no libc10_cuda.so")
  else()
    skv_find_cuda_compiler()
    if(NOT SKV_CUDA_COMPILER_FOUND)
      set(skv_cuda_obstacle "no CUDA compiler found (PATH, CUDACXX or CMAKE_CUDA_COMPILER)")
    endif()
  endif()

  if(NOT skv_cuda_obstacle)
    skv_enable_cuda()
    string(REGEX MATCH "^[0-9]+" skv_nvcc_major "${CMAKE_CUDA_COMPILER_VERSION}")
    # One process has one CUDA runtime of a major version: torch's.
    if(NOT skv_nvcc_major EQUAL skv_torch_cuda_major)
      set(skv_cuda_obstacle "torch was built with CUDA ${skv_torch_cuda}, but nvcc is "
        "${CMAKE_CUDA_COMPILER_VERSION}; the major versions must agree")
      string(CONCAT skv_cuda_obstacle ${skv_cuda_obstacle})
    endif()
  endif()

  if(NOT skv_cuda_obstacle)
    set(SKV_CUDA_ENABLED TRUE)
  elseif(skv_cuda_choice STREQUAL "ON")
    message(FATAL_ERROR "STATEFUL_KV_CUDA=ON: ${skv_cuda_obstacle}")
  else()
    message(STATUS "stateful_kv: CUDA off: ${skv_cuda_obstacle}")
  endif()
endif()

if(SKV_CUDA_ENABLED)
  # The shared runtime, which torch has loaded already; a static copy would be a second one. It is
  # the linking target that decides, so this is set for the whole directory.
  set(CMAKE_CUDA_RUNTIME_LIBRARY Shared)
  file(GLOB skv_cuda_sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/csrc/kernels/cuda/*.cu)
  skv_instantiate_kernels(skv_instantiated_sources)
  add_library(skv_cuda STATIC ${skv_cuda_sources} ${skv_instantiated_sources})
  skv_configure_cuda_target(skv_cuda)
  target_include_directories(skv_cuda SYSTEM INTERFACE
    ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
  target_link_libraries(skv_cuda INTERFACE ${STATEFUL_KV_TORCH_DIR}/lib/libc10_cuda.so)
  # CMake would cut a definition in two at a semicolon.
  string(REPLACE ";" "," SKV_CUDA_ARCHS_TEXT "${STATEFUL_KV_CUDA_ARCHS}")
  message(STATUS "stateful_kv: CUDA on: torch CUDA ${skv_torch_cuda}, nvcc "
    "${CMAKE_CUDA_COMPILER_VERSION}, architectures ${STATEFUL_KV_CUDA_ARCHS}")
endif()
