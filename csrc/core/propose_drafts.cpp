#include "csrc/core/propose_drafts.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <stdexcept>
#include <string>

namespace skv {
namespace {

void require_size(const char* what, size_t expected, size_t got) {
  if (got == expected) return;
  throw std::invalid_argument(std::string("propose_drafts: ") + what + ": expected " +
                              std::to_string(expected) + " entries, one an index, got " +
                              std::to_string(got));
}

}  // namespace

void require_distinct(std::span<NgramIndex* const> indexes) {
  std::vector<NgramIndex*> sorted(indexes.begin(), indexes.end());
  std::sort(sorted.begin(), sorted.end(), std::less<>());
  if (std::adjacent_find(sorted.begin(), sorted.end()) != sorted.end()) {
    throw std::invalid_argument("propose_drafts: indexes: an index stands twice in the list");
  }
}

DraftBatch propose_drafts(std::span<NgramIndex* const> indexes, std::span<const TokenSpan> tokens,
                          std::span<const int64_t> max_tokens) {
  require_size("tokens", indexes.size(), tokens.size());
  require_size("max_tokens", indexes.size(), max_tokens.size());
  require_distinct(indexes);
  int64_t most_tokens = 0;
  for (size_t i = 0; i < indexes.size(); ++i) {
    NgramIndex::require_max_tokens(max_tokens[i]);
    indexes[i]->require_appendable(tokens[i]);
    most_tokens += std::min(max_tokens[i], NgramIndex::kMaxDraft);
  }
  if (most_tokens > std::numeric_limits<int32_t>::max()) {
    throw std::invalid_argument("propose_drafts: max_tokens: expected a sum below 2^31, got " +
                                std::to_string(most_tokens));
  }

  DraftBatch batch;
  batch.lens.reserve(indexes.size());
  batch.match_lens.reserve(indexes.size());
  for (size_t i = 0; i < indexes.size(); ++i) {
    indexes[i]->append(tokens[i]);
    Draft draft;
    if (max_tokens[i] > 0) draft = indexes[i]->propose(max_tokens[i]);
    batch.tokens.insert(batch.tokens.end(), draft.tokens.begin(), draft.tokens.end());
    batch.lens.push_back(static_cast<int32_t>(draft.tokens.size()));
    batch.match_lens.push_back(static_cast<int32_t>(draft.match_len));
  }
  return batch;
}

}  // namespace skv
