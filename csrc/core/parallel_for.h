// The hook through which a caller lends its threads to the kernels. The kernels own no thread:
// the torch bindings pass the ThreadPool, tests pass serial_parallel_for.
#pragma once

#include <cstdint>

#include "csrc/core/function_ref.h"

namespace skv {

// Runs body(begin, end) on disjoint sub-ranges that cover [0, n). Which thread runs which range,
// and how many ranges there are, must never change a result. `grain` is the smallest range worth
// a thread of its own.
using RangeBody = FunctionRef<void(int64_t begin, int64_t end)>;
using ParallelFor = FunctionRef<void(int64_t n, int64_t grain, RangeBody body)>;

inline void serial_parallel_for(int64_t n, int64_t /*grain*/, RangeBody body) {
  if (n > 0) body(0, n);
}

}  // namespace skv
