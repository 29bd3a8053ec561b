// Checks of the offsets of ragged batches: their shape, for every device, and their values, for
// tensors in host memory.
#pragma once

#include <cstdint>
#include <string>

#include "csrc/ops/checks.h"

namespace skv::ops {

// Host memory only. offsets: int32[S + 1] from 0, ascending, to at most `num_rows`: the rows behind
// the last one belong to no sequence.
inline void check_row_offsets(const OpCheck& check, const char* name, const int32_t* values,
                              int64_t last, int64_t num_rows, const char* counted = "rows") {
  TORCH_CHECK_VALUE(values[0] == 0, check.op(), ": ", name, ": expected offsets that start at 0, ",
                    "got ", values[0]);
  for (int64_t i = 0; i < last; ++i) {
    TORCH_CHECK_VALUE(values[i] <= values[i + 1], check.op(), ": ", name,
                      ": expected ascending offsets, got ", values[i], " before ", values[i + 1],
                      " at index ", i);
  }
  TORCH_CHECK_VALUE(values[last] <= num_rows, check.op(), ": ", name,
                    ": expected offsets up to the number of ", counted, " = ", num_rows, ", got ",
                    values[last]);
}

inline void check_row_offsets(const OpCheck& check, const char* name, const at::Tensor& offsets,
                              int64_t num_rows, const char* counted = "rows") {
  check_row_offsets(check, name, offsets.const_data_ptr<int32_t>(), offsets.numel() - 1, num_rows,
                    counted);
}

// The same, up to exactly `total`, the number of `counted`.
inline void check_offset_values(const OpCheck& check, const char* name, const at::Tensor& offsets,
                                int64_t total, const char* counted = "rows") {
  check_row_offsets(check, name, offsets, total, counted);
  const int32_t last = offsets.const_data_ptr<int32_t>()[offsets.numel() - 1];
  TORCH_CHECK_VALUE(last == total, check.op(), ": ", name,
                    ": expected offsets that end at the number of ", counted, " = ", total,
                    ", got ", last);
}

// int32[S + 1] with at least one element, contiguous; returns S, or what `symbol` names.
inline c10::SymInt check_offsets_shape(const OpCheck& check, const char* name,
                                       const at::Tensor& offsets, const std::string& symbol = "S") {
  const std::string size = symbol + " + 1";
  check(name, offsets).dtype({at::kInt}).shape({{size.c_str()}}).contiguous();
  check.value(name, holds(offsets.sym_size(0).sym_gt(0)),
              "shape [" + size + "] with " + symbol + " >= 0", offsets);
  return offsets.sym_size(0) - 1;
}

}  // namespace skv::ops
