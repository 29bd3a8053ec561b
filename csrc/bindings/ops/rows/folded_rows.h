// Folds the leading dimensions of a tensor into rows with at most two strides, so that a kernel
// can read views (the heads of a fused qkv row) without a copy.
#pragma once

#include <cstdint>

#include "csrc/bindings/checks.h"

namespace skv::bindings {

// Row r starts at (r / inner_rows) * outer_stride + (r % inner_rows) * inner_stride.
struct FoldedRows {
  int64_t num_rows = 1;
  int64_t inner_rows = 1;
  int64_t inner_stride = 0;
  int64_t outer_stride = 0;
};

inline FoldedRows fold_rows(const OpCheck& check, const char* name, const at::Tensor& tensor) {
  FoldedRows rows;
  int64_t num_groups = 0;  // groups of dimensions that one stride walks through
  int64_t next_stride = 0;
  for (int64_t axis = tensor.dim() - 2; axis >= 0; --axis) {
    const int64_t size = tensor.size(axis);
    rows.num_rows *= size;
    if (size == 1) continue;
    const int64_t stride = tensor.stride(axis);
    if (num_groups == 0 || stride != next_stride) {
      ++num_groups;
      if (num_groups == 1) rows.inner_stride = stride;
      if (num_groups == 2) rows.outer_stride = stride;
    }
    if (num_groups == 1) rows.inner_rows *= size;
    next_stride = stride * size;
  }
  if (rows.num_rows == 0) return {.num_rows = 0};
  TORCH_CHECK_VALUE(num_groups <= 2, check.op(), ": ", name,
                    ": expected leading dimensions that fold into two strides, got ",
                    describe(tensor), " with strides ", tensor.strides());
  return rows;
}

}  // namespace skv::bindings
