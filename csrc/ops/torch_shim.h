// All that op files take from torch beside the argument checks of checks.h. Keep it small: what is
// listed here is what a build on torch's stable ABI would have to replace.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <cstdint>
#include <initializer_list>
#include <tuple>

#include "csrc/core/parallel_for.h"
#include "csrc/core/thread_pool.h"
#include "csrc/kernels/params.h"

namespace skv::ops {

// Lends the process's threads to a kernel, as many as torch.set_num_threads allows: pass
// torch_parallel_for where a ParallelFor is wanted. Torch's own OpenMP threads are not used: they
// would wait for each other at the end of every kernel, on a busy machine for whole time slices.
struct TorchParallelFor {
  void operator()(int64_t n, int64_t grain, RangeBody body) const {
    ThreadPool::instance().run(n, grain, at::get_num_threads(), body);
  }
};
inline constexpr TorchParallelFor torch_parallel_for{};

// Precondition: one of kKvDtypes in checks.h.
inline DType dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kHalf:
      return DType::kFloat16;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kChar:
      return DType::kInt8;
    default:
      TORCH_INTERNAL_ASSERT(tensor.scalar_type() == at::kFloat);
      return DType::kFloat32;
  }
}

using TwoTensors = std::tuple<at::Tensor, at::Tensor>;

// A fresh contiguous tensor on the device of `like`.
inline at::Tensor empty_tensor(std::initializer_list<c10::SymInt> sizes, at::ScalarType dtype,
                               const at::Tensor& like) {
  return at::empty_symint(c10::SymIntArrayRef(sizes),
                          like.options().dtype(dtype).requires_grad(false));
}

}  // namespace skv::ops
