// The end of a step of sequences whose tokens lie in device memory.
#pragma once

#include "csrc/kernels/token_params.h"

namespace skv::cpu {

// Walks the rows of each sequence and appends the model's choice after each to its history, until a
// row's choice is not what the next row fed, is a stop token, is the last one the reply may get, or
// is none since the largest logit is not finite; that one is not appended. num_left counts down,
// becomes 0 after a stop token and kStoppedByBadLogits where there was no choice. counts gets one
// step, the drafted tokens, and those of them that were appended. A sequence without rows stays as
// it is. Preconditions, for a sequence with n rows: num_left[s] >= 1 and lengths[s] +
// min(n, num_left[s]) <= L. O(N * E).
void advance_sequences(const AdvanceSequencesParams& params);

}  // namespace skv::cpu
