# Shared by Cuda.cmake and CudaCheck.cmake: how a CUDA object of this project is compiled.

# Sets SKV_CUDA_COMPILER_FOUND. Looks for nvcc without failing where there is none or a broken one.
macro(skv_find_cuda_compiler)
  # Only so that CMake's own compiler test has an architecture; the targets name theirs.
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES ${STATEFUL_KV_CUDA_ARCHS})
  endif()
  if(NOT CMAKE_CUDA_COMPILER)
    unset(CMAKE_CUDA_COMPILER CACHE)  # where none was found before, one may be installed by now
  endif()
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    set(SKV_CUDA_COMPILER_FOUND TRUE)
  else()
    set(SKV_CUDA_COMPILER_FOUND FALSE)
  endif()
endmacro()

# Enables the language, and C++20 for it: CMake 3.25.1 does not know that nvcc has it from 12.0 on.
# A macro, because the variables must be set in the directory of the targets.
macro(skv_enable_cuda)
  enable_language(CUDA)
  if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION AND
     CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.0)
    set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
    set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
  endif()
endmacro()

# Include path, language level, warnings and architectures of the target `name`, which
# must be created after skv_enable_cuda.
function(skv_configure_cuda_target name)
  target_include_directories(${name} PUBLIC ${PROJECT_SOURCE_DIR})
  set_target_properties(${name} PROPERTIES
    CUDA_ARCHITECTURES "${STATEFUL_KV_CUDA_ARCHS}"
    CUDA_STANDARD 20
    CUDA_STANDARD_REQUIRED ON
    CUDA_EXTENSIONS OFF
    POSITION_INDEPENDENT_CODE ON)
  # -lineinfo costs nothing at run time and gives profilers the source lines.
  target_compile_options(${name} PRIVATE
    $<$<COMPILE_LANGUAGE:CUDA>:-lineinfo -Xcompiler=-Wall,-Wextra>)
  if(STATEFUL_KV_WERROR)
    target_compile_options(${name} PRIVATE
      $<$<COMPILE_LANGUAGE:CUDA>:--Werror=all-warnings -Xcompiler=-Werror>)
  endif()
  # Kernels with the instructions of Hopper alone trap in code for anything else: never launch those.
  if(STATEFUL_KV_CUDA_ARCHS MATCHES "90a")
    target_compile_definitions(${name} PRIVATE SKV_BUILT_FOR_SM90A)
  endif()
  if(STATEFUL_KV_CUDA_ASSERTS)
    target_compile_definitions(${name} PRIVATE SKV_DEVICE_ASSERTS)
  endif()
endfunction()
