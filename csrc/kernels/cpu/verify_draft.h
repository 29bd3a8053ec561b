// Greedy verification of drafts: how many drafted tokens the model agrees with, and what it says
// next.
#pragma once

#include "csrc/core/parallel_for.h"
#include "csrc/kernels/token_params.h"

namespace skv::cpu {

// num_accepted[s] is the largest n with draft[s][i] == target[s][i] for all i < n, and bonus_ids[s]
// is target[s][n]. Preconditions: draft_offsets[0] == 0 and draft_offsets ascends.
void verify_draft(const VerifyDraftParams& params, ParallelFor parallel_for);

}  // namespace skv::cpu
