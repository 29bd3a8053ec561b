// What CPU and CUDA kernels of a loop of steps have to count alike. Lengths and limits lie in
// device memory as int32; what is computed from them is not, so that no extreme value wraps.
#pragma once

#include <cstdint>
#include <limits>

#include "csrc/kernels/host_device.h"
#include "csrc/kernels/token_params.h"

namespace skv {

// Rows that a sequence gets in the next step, from 0 to K + 1: its pending token and as much of its
// draft as the reply and the KV have room for.
SKV_HOST_DEVICE int64_t num_step_rows(const FillRowsParams& params, int64_t sequence) {
  const int64_t num_left = params.num_left[sequence];
  const int64_t room = int64_t{params.kv_limits[sequence]} - params.lengths[sequence];
  if (num_left <= 0 || room < 0) return 0;
  int64_t num_draft = params.num_draft[sequence];
  num_draft = num_draft < num_left - 1 ? num_draft : num_left - 1;
  num_draft = num_draft < room ? num_draft : room;
  num_draft = num_draft < params.max_draft ? num_draft : params.max_draft;
  return 1 + (num_draft > 0 ? num_draft : 0);
}

inline constexpr int64_t kLargestCount = std::numeric_limits<int32_t>::max();

// A counter that stays at the largest number instead of becoming negative. Precondition: more >= 0.
SKV_HOST_DEVICE int32_t add_to_count(int32_t count, int64_t more) {
  const int64_t sum = count + more;
  return static_cast<int32_t>(sum < kLargestCount ? sum : kLargestCount);
}

}  // namespace skv
