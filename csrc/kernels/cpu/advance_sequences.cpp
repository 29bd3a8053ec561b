#include "csrc/kernels/cpu/advance_sequences.h"

#include <algorithm>
#include <cmath>

#include "csrc/kernels/loop_rule.h"

namespace skv::cpu {

namespace {

void advance(const AdvanceSequencesParams& params, int64_t sequence) {
  const int64_t begin = params.query_offsets[sequence];
  const int64_t end = params.query_offsets[sequence + 1];
  if (begin == end) return;
  int32_t* history = params.history + sequence * params.capacity;
  int32_t& length = params.lengths[sequence];
  int32_t& num_left = params.num_left[sequence];
  int32_t* counts = params.counts + 3 * sequence;
  const int32_t* stops = params.stop_ids + sequence * params.num_stop_ids;
  const int32_t* stops_end = stops + params.num_stop_ids;
  counts[0] = add_to_count(counts[0], 1);
  counts[1] = add_to_count(counts[1], end - begin - 1);
  for (int64_t row = begin; row < end; ++row) {
    if (!std::isfinite(params.target_values[row])) {
      num_left = kStoppedByBadLogits;
      return;
    }
    const auto token = static_cast<int32_t>(params.target_ids[row]);
    const bool agrees = row + 1 < end && params.token_ids[row + 1] == token;
    history[length++] = token;
    if (agrees) counts[2] = add_to_count(counts[2], 1);
    --num_left;
    if (std::find(stops, stops_end, token) != stops_end) num_left = 0;
    if (num_left == 0 || !agrees) return;
  }
}

}  // namespace

void advance_sequences(const AdvanceSequencesParams& params) {
  for (int64_t sequence = 0; sequence < params.num_sequences; ++sequence) {
    advance(params, sequence);
  }
}

}  // namespace skv::cpu
