// The rows of the next step of sequences whose tokens lie in device memory.
#pragma once

#include "csrc/kernels/token_params.h"

namespace skv::cpu {

// Sequence s has no rows if num_left[s] <= 0 or its pending token has no room, lengths[s] >
// kv_limits[s]; else 1 + min(num_draft[s], num_left[s] - 1, kv_limits[s] - lengths[s]): the pending
// token, then the draft. So the last token of a reply is never a drafted one.
// Preconditions, for a sequence with rows: 1 <= lengths[s] <= L, kv_limits[s] <= M * page_size,
// 0 <= num_draft[s] <= K. O(N).
void fill_rows(const FillRowsParams& params);

}  // namespace skv::cpu
