// Prompt lookup: proposes what followed the latest earlier occurrence of the text's own ending.
#pragma once

#include "csrc/core/parallel_for.h"
#include "csrc/kernels/token_params.h"

namespace skv::cpu {

// For each sequence: of the suffixes with a length in [min_n, max_n] that occur earlier
// too, the longest is taken, and of its earlier occurrences the most recent. The draft is the text
// behind that occurrence, at most max_draft tokens. If the occurrence overlaps the suffix, the text
// is periodic and the draft goes on periodically; else it stops where the text ends. The same rule
// as NgramIndex::propose. O(tokens of the sequence * max_n), about O(tokens) in ordinary text.
// Preconditions: offsets ascend within [0, T]; 0 <= lengths[s] <= offsets[s+1] - offsets[s];
// 1 <= min_n <= max_n; tokens fit int32.
void ngram_lookup(const NgramLookupParams& params, ParallelFor parallel_for);

}  // namespace skv::cpu
