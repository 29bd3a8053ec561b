// Where did the last few tokens of a text occur before, and what followed? The source of drafts.
//
// The index holds the tokens themselves and, for every position e and every n in [min_n, max_n],
// where the n-gram that ends at e ended the time before: previous(e, n). The last n-gram of each
// kind is found through one open-addressed hash table with entries (tag of (n, hash), end
// position). An entry is trusted only after its tokens are compared, so a hash collision costs
// time and never a wrong match.
//
// Undoing is exact: tokens leave in the opposite order they came, so setting an entry back to
// previous(e, n), or emptying it, leaves the table as if the token had never been.
//
// append O(max_n - min_n + 1) amortised for a token, truncate the same for a token removed, propose
// O(max_n + draft) plus hash collisions. About 28 bytes a token for the chains and about 100 for
// the table (defaults). fork() is O(1): the copy is made when one of the two changes.
// Not thread safe: the engine thread owns the index.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "csrc/core/ids.h"
#include "csrc/core/token_span.h"

namespace skv {

struct Draft {
  std::vector<TokenId> tokens;
  int64_t match_len = 0;  // n of the match; 0 = no match, no tokens
};

class NgramIndex {
 public:
  static constexpr int64_t kMaxN = 64;
  static constexpr int64_t kMaxDraft = int64_t{1} << 20;  // bounds the memory of a periodic draft

  // 1 <= min_n <= max_n <= kMaxN, else std::invalid_argument.
  explicit NgramIndex(int64_t min_n = 2, int64_t max_n = 8);

  // Adds tokens at the end; std::invalid_argument on a value that is no token id, and nothing is
  // added.
  void append(TokenSpan tokens);
  // Throws what append() would throw, without appending. O(tokens).
  void require_appendable(TokenSpan tokens) const;

  // Drops all tokens from `length` on. 0 <= length <= size().
  void truncate(int64_t length);

  int64_t size() const;

  // Looks for the longest suffix of the text (min_n..max_n tokens) that also ends earlier, the
  // latest such end winning, and returns up to max_tokens of what followed. If the earlier
  // occurrence overlaps the suffix the text is periodic and the draft goes on periodically; else
  // it stops where the text ends. Never more than kMaxDraft tokens. max_tokens >= 0, else
  // std::invalid_argument.
  Draft propose(int64_t max_tokens) const;
  // Throws what propose() would throw.
  static void require_max_tokens(int64_t max_tokens);

  // An index of the same text that changes on its own from here on. O(1).
  NgramIndex fork() const { return *this; }

  // Describes the first violation found. O(size * n).
  std::optional<std::string> check_integrity() const;

 private:
  friend class NgramIndexTestPeer;

  struct Entry {
    uint32_t tag;
    int32_t last;  // end position of the latest n-gram with this key; kNowhere = empty entry
  };

  struct State {
    std::vector<TokenId> tokens;
    std::vector<int32_t> previous;  // [size, max_n - min_n + 1]
    std::vector<Entry> table;       // power of two, at most 3/4 full
    int64_t num_entries = 0;
  };

  static constexpr int32_t kNowhere = -1;

  int64_t width() const { return max_n_ - min_n_ + 1; }
  State& own_state();
  void grow_table(State& state, int64_t num_entries, int64_t num_indexed) const;
  static size_t find_slot(const State& state, uint32_t tag, size_t slot);
  void add_positions(State& state, int64_t begin, int64_t end) const;
  void remove_position(State& state, int64_t end) const;
  int64_t previous_match(int64_t n) const;
  // Calls visit(n, hash) for the n-grams that end at `end`, n ascending.
  template <typename Visit>
  void for_each_ngram(const State& state, int64_t end, Visit visit) const;
  std::optional<std::string> check_chains() const;
  std::optional<std::string> check_table() const;

  int64_t min_n_;
  int64_t max_n_;
  std::shared_ptr<State> state_;  // shared with forks until one of them changes
};

}  // namespace skv
