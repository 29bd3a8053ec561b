// Folds the leading dimensions of a tensor into rows with at most two strides, so that a kernel
// can read views (the heads of a fused qkv row) without a copy.
#pragma once

#include <cstdint>
#include <type_traits>

#include "csrc/ops/checks.h"

namespace skv::ops {

// Row r starts at (r / inner_rows) * outer_stride + (r % inner_rows) * inner_stride. Int is
// int64_t, or c10::SymInt for tensors that are traced.
template <typename Int>
struct FoldedRows {
  Int num_rows = 1;
  Int inner_rows = 1;
  Int inner_stride = 0;
  Int outer_stride = 0;
  int64_t num_strides = 0;  // that the dimensions need; rows can be read if it is at most 2

  static FoldedRows of(const at::Tensor& tensor) {
    FoldedRows rows;
    Int next_stride = 0;
    for (int64_t axis = tensor.dim() - 2; axis >= 0; --axis) {
      const Int size = size_of(tensor, axis);
      rows.num_rows *= size;
      if (size == 1) continue;
      const Int stride = stride_of(tensor, axis);
      if (rows.num_strides == 0 || stride != next_stride) {
        ++rows.num_strides;
        if (rows.num_strides == 1) rows.inner_stride = stride;
        if (rows.num_strides == 2) rows.outer_stride = stride;
      }
      if (rows.num_strides == 1) rows.inner_rows *= size;
      next_stride = stride * size;
    }
    if (rows.num_rows == 0) return {.num_rows = 0};
    return rows;
  }

 private:
  static Int size_of(const at::Tensor& tensor, int64_t axis) {
    if constexpr (std::is_same_v<Int, int64_t>)
      return tensor.size(axis);
    else
      return tensor.sym_size(axis);
  }
  static Int stride_of(const at::Tensor& tensor, int64_t axis) {
    if constexpr (std::is_same_v<Int, int64_t>)
      return tensor.stride(axis);
    else
      return tensor.sym_stride(axis);
  }
};

inline void check_folds(const OpCheck& check, const char* name, const at::Tensor& tensor) {
  if (tensor.dim() <= 3) return;  // two leading dimensions never need more
  TORCH_CHECK_VALUE(FoldedRows<c10::SymInt>::of(tensor).num_strides <= 2, check.op(), ": ", name,
                    ": expected leading dimensions that fold into two strides, got ",
                    describe(tensor), " with strides ", tensor.sym_strides());
}

}  // namespace skv::ops
