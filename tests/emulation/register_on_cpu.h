// Included before each cuda.cpp of csrc/ops: the ops they register for CUDA become the ops
// of CPU tensors in a process that loads the library.
#pragma once

#include <torch/library.h>

#undef TORCH_LIBRARY_IMPL
#define TORCH_LIBRARY_IMPL(name_space, key, m) _TORCH_LIBRARY_IMPL(name_space, CPU, m, C10_UID)
