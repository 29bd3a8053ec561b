# Torch, linked by path instead of through find_package(Torch): that would demand a CUDA toolkit for
# a CUDA build of torch even when ours is off, and would overwrite CMAKE_CUDA_ARCHITECTURES
# (docs/adr/0007-link-torch-by-path.md).
#   out: SKV_TORCH_VERSION_TEXT; skv_link_torch(target libraries...)
include_guard(GLOBAL)
if(NOT EXISTS "${STATEFUL_KV_TORCH_DIR}/include/torch/library.h")
  message(FATAL_ERROR "STATEFUL_KV_TORCH_DIR: expected the folder of an installed torch package, "
    "got '${STATEFUL_KV_TORCH_DIR}'. Build with pip (see README) or pass "
    "-DSTATEFUL_KV_TORCH_DIR=$(python -c 'import torch; print(torch.__path__[0])')")
endif()
file(STRINGS "${STATEFUL_KV_TORCH_DIR}/version.py" skv_torch_version_line REGEX "^__version__")
string(REGEX MATCH "[0-9]+\\.[0-9]+\\.[0-9]+[^'\"]*" SKV_TORCH_VERSION_TEXT
  "${skv_torch_version_line}")
message(STATUS "stateful_kv: torch ${SKV_TORCH_VERSION_TEXT} in ${STATEFUL_KV_TORCH_DIR}")

function(skv_link_torch target)
  target_include_directories(${target} SYSTEM PRIVATE ${STATEFUL_KV_TORCH_DIR}/include
    ${STATEFUL_KV_TORCH_DIR}/include/torch/csrc/api/include)
  target_link_directories(${target} PRIVATE ${STATEFUL_KV_TORCH_DIR}/lib)
  target_link_libraries(${target} PRIVATE ${ARGN})
  target_compile_options(${target} PRIVATE -Wall -Wextra)
  # What our own libraries are built from stays inside them.
  target_link_options(${target} PRIVATE -Wl,--exclude-libs,ALL)
endfunction()
