// Drafts for a whole batch of texts in one call.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "csrc/core/ids.h"
#include "csrc/core/ngram_index.h"
#include "csrc/core/token_span.h"

namespace skv {

// The drafts of S indexes, one after the other.
struct DraftBatch {
  std::vector<TokenId> tokens;      // [sum of lens]
  std::vector<int32_t> lens;        // [S]
  std::vector<int32_t> match_lens;  // [S], NgramIndex::propose's match_len; 0 = no match, no draft
};

// Throws std::invalid_argument where an index stands in the list twice. Looks only at the pointers.
void require_distinct(std::span<NgramIndex* const> indexes);

// For each i: indexes[i]->append(tokens[i]), then indexes[i]->propose(max_tokens[i]). Where
// max_tokens[i] is 0 nothing is looked up, and both lengths are 0. The three lists are equally long
// and the indexes distinct. All arguments are checked before any index changes
// (std::invalid_argument). Cost: that of the single calls.
DraftBatch propose_drafts(std::span<NgramIndex* const> indexes, std::span<const TokenSpan> tokens,
                          std::span<const int64_t> max_tokens);

}  // namespace skv
