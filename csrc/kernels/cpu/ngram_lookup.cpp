#include "csrc/kernels/cpu/ngram_lookup.h"

#include <algorithm>

namespace skv::cpu {

namespace {

// Number of equal tokens, at most `limit`, walking back from the ends of [0, end) and [0, length).
template <typename Token>
int64_t common_ending(const Token* text, int64_t end, int64_t length, int64_t limit) {
  int64_t matched = 0;
  while (matched < limit && text[end - 1 - matched] == text[length - 1 - matched]) ++matched;
  return matched;
}

struct Occurrence {
  int64_t end = 0;     // one past its last token
  int64_t length = 0;  // matching tokens; 0 = none found
};

// The most recent earlier occurrence of the longest matching suffix.
template <typename Token>
Occurrence find_occurrence(const Token* text, int64_t length, int64_t min_n, int64_t max_n) {
  Occurrence best;
  int64_t to_beat = min_n - 1;
  for (int64_t end = length - 1; end > to_beat && to_beat < max_n; --end) {
    const int64_t matched = common_ending(text, end, length, std::min(max_n, end));
    if (matched > to_beat) {
      to_beat = matched;
      best = {end, matched};
    }
  }
  return best;
}

template <typename Token>
void look_up(const NgramLookupParams& params, int64_t sequence) {
  const int64_t start = params.offsets[sequence];
  const int64_t length =
      params.lengths != nullptr ? params.lengths[sequence] : params.offsets[sequence + 1] - start;
  const Token* text = static_cast<const Token*>(params.tokens) + start;
  int32_t* draft = params.draft_ids + sequence * params.max_draft;

  int64_t num_draft = 0;
  const Occurrence found = find_occurrence(text, length, params.min_n, params.max_n);
  if (found.length > 0) {
    const int64_t period = length - found.end;
    const bool overlaps = period < found.length;
    num_draft = overlaps ? params.max_draft : std::min(params.max_draft, period);
    for (int64_t i = 0; i < num_draft; ++i) {
      draft[i] = static_cast<int32_t>(text[found.end + i % period]);
    }
  }
  std::fill(draft + num_draft, draft + params.max_draft, -1);
  params.num_draft[sequence] = static_cast<int32_t>(num_draft);
}

}  // namespace

void ngram_lookup(const NgramLookupParams& params, ParallelFor parallel_for) {
  auto look_up_range = [&](int64_t begin, int64_t end) {
    for (int64_t sequence = begin; sequence < end; ++sequence) {
      if (params.tokens_are_int64) {
        look_up<int64_t>(params, sequence);
      } else {
        look_up<int32_t>(params, sequence);
      }
    }
  };
  parallel_for(params.num_sequences, /*grain=*/1, look_up_range);
}

}  // namespace skv::cpu
