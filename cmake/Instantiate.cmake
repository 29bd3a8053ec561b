# Sources with one instantiation of a kernel template each, so that they compile at the same time.
# They are written into the build folder, from the lists below, by whoever compiles the CUDA
# kernels: the extension, the compile check and the emulator.
#   skv_instantiate_kernels(VARIABLE)   VARIABLE becomes the list of these files

# Head dims of paged attention (HeadDims in csrc/kernels/cuda/kernels.h), and those for which there
# are products by warpgroups (WarpgroupHeadDims in csrc/kernels/cuda/attention_task.h).
set(SKV_HEAD_DIMS 64 96 128 256)
set(SKV_WARPGROUP_HEAD_DIMS 64 128)

function(skv_instantiate_kernels variable)
  set(folder ${CMAKE_BINARY_DIR}/instantiated)
  set(sources "")
  foreach(head_dim IN LISTS SKV_HEAD_DIMS)
    list(APPEND sources ${folder}/attention_tiles_${head_dim}.cu)
    skv_write_attention(attention_tiles_${head_dim} "${head_dim}, false")
  endforeach()
  foreach(head_dim IN LISTS SKV_WARPGROUP_HEAD_DIMS)
    list(APPEND sources ${folder}/attention_warpgroups_${head_dim}.cu)
    skv_write_attention(attention_warpgroups_${head_dim} "${head_dim}, true")
  endforeach()
  set(${variable} ${sources} PARENT_SCOPE)
endfunction()

# A file that says the same already is left alone, and not compiled again.
function(skv_write_attention name arguments)
  file(CONFIGURE OUTPUT ${CMAKE_BINARY_DIR}/instantiated/${name}.cu CONTENT
"// Written by cmake/Instantiate.cmake.
#include \"csrc/kernels/cuda/attention_tile.cuh\"

namespace skv::cuda {

template cudaError_t launch_tiles<${arguments}>(const AttentionTask& task, cudaStream_t stream);

}  // namespace skv::cuda
")
endfunction()
