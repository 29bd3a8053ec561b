// Copies whole pages of K and V within the pools: the copies of copy-on-write.
#pragma once

#include "csrc/core/parallel_for.h"
#include "csrc/kernels/kv_params.h"

namespace skv::cpu {

// Precondition: every page id is in [0, P). Pairs take effect in order.
void copy_pages(const CopyPagesParams& params, ParallelFor parallel_for);

}  // namespace skv::cpu
