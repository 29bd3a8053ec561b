#include "csrc/core/ngram_index.h"

#include <algorithm>
#include <array>
#include <limits>
#include <stdexcept>
#include <unordered_map>

#include "csrc/core/assert.h"

namespace skv {
namespace {

constexpr size_t kMinTable = 64;

int64_t max_entries(size_t table_size) { return static_cast<int64_t>(table_size / 4 * 3); }

uint64_t mix(uint64_t hash) {
  hash ^= hash >> 32;
  hash *= 0xd6e8feb86659fd93ULL;
  return hash ^ (hash >> 32);
}

// The index takes the low bits of the hash, the tag the high ones. n itself is part of the tag: two
// lengths that shared an entry would break each other's chains.
uint32_t tag_of(int64_t n, uint64_t hash) {
  constexpr uint32_t kMask = NgramIndex::kMaxN - 1;
  return (static_cast<uint32_t>(hash >> 32) & ~kMask) | static_cast<uint32_t>(n - 1);
}

}  // namespace

NgramIndex::NgramIndex(int64_t min_n, int64_t max_n)
    : min_n_(min_n), max_n_(max_n), state_(std::make_shared<State>()) {
  if (min_n < 1 || max_n < min_n || max_n > kMaxN) {
    throw std::invalid_argument(
        "NgramIndex: expected 1 <= min_n <= max_n <= " + std::to_string(kMaxN) + ", got " +
        std::to_string(min_n) + ", " + std::to_string(max_n));
  }
}

int64_t NgramIndex::size() const { return static_cast<int64_t>(state_->tokens.size()); }

NgramIndex::State& NgramIndex::own_state() {
  if (state_.use_count() > 1) state_ = std::make_shared<State>(*state_);
  return *state_;
}

template <typename Visit>
void NgramIndex::for_each_ngram(const State& state, int64_t end, Visit visit) const {
  const TokenId* const last = state.tokens.data() + end;
  const int64_t longest = std::min(max_n_, end + 1);
  uint64_t hash = 0;
  for (int64_t n = 1; n <= longest; ++n) {
    // The constant keeps runs of token 0 apart by their length.
    hash =
        (hash + static_cast<uint64_t>(last[1 - n]) + 0x9e3779b97f4a7c15ULL) * 0xff51afd7ed558ccdULL;
    hash ^= hash >> 29;
    if (n >= min_n_) visit(n, mix(hash));
  }
}

// The first entry of the probe run from `slot` that has this tag or is empty.
size_t NgramIndex::find_slot(const State& state, uint32_t tag, size_t slot) {
  while (state.table[slot].last != kNowhere && state.table[slot].tag != tag) {
    slot = (slot + 1) & (state.table.size() - 1);
  }
  return slot;
}

// Indexes the n-grams that end in [begin, end). Needs a table with room for them.
void NgramIndex::add_positions(State& state, int64_t begin, int64_t end) const {
  // The table outgrows the caches, so the addresses of a few positions are known and requested
  // before the first of them is used: the misses overlap.
  constexpr int64_t kAhead = 8;
  std::array<uint64_t, kAhead * kMaxN> hashes;
  const size_t mask = state.table.size() - 1;
  for (int64_t block = begin; block < end; block += kAhead) {
    const int64_t block_end = std::min(block + kAhead, end);
    size_t count = 0;
    for (int64_t position = block; position < block_end; ++position) {
      for_each_ngram(state, position, [&](int64_t, uint64_t hash) {
        __builtin_prefetch(&state.table[static_cast<size_t>(hash) & mask], 1);
        hashes[count++] = hash;
      });
    }
    count = 0;
    for (int64_t position = block; position < block_end; ++position) {
      int32_t* const previous = state.previous.data() + position * width();
      std::fill_n(previous, width(), kNowhere);
      for (int64_t n = min_n_; n <= std::min(max_n_, position + 1); ++n) {
        const uint64_t hash = hashes[count++];
        const uint32_t tag = tag_of(n, hash);
        Entry& entry = state.table[find_slot(state, tag, static_cast<size_t>(hash) & mask)];
        if (entry.last == kNowhere) ++state.num_entries;
        previous[n - min_n_] = entry.last;
        entry = {tag, static_cast<int32_t>(position)};
      }
    }
  }
}

void NgramIndex::remove_position(State& state, int64_t end) const {
  const size_t mask = state.table.size() - 1;
  const int32_t* const previous = state.previous.data() + end * width();
  std::array<size_t, kMaxN> slots;
  int64_t count = 0;
  for_each_ngram(state, end, [&](int64_t n, uint64_t hash) {
    const size_t slot = find_slot(state, tag_of(n, hash), static_cast<size_t>(hash) & mask);
    SKV_ASSERT(state.table[slot].last == end, "the newest n-gram is not the last one in its entry");
    slots[static_cast<size_t>(count++)] = slot;
  });
  for (int64_t i = count - 1; i >= 0; --i) {
    Entry& entry = state.table[slots[static_cast<size_t>(i)]];
    entry.last = previous[i];
    if (entry.last == kNowhere) --state.num_entries;
  }
}

// A larger table is filled in the order of the text, which is what keeps undoing exact.
void NgramIndex::grow_table(State& state, int64_t num_entries, int64_t num_indexed) const {
  size_t size = std::max(kMinTable, state.table.size());
  while (num_entries > max_entries(size)) size *= 2;
  state.table.assign(size, Entry{0, kNowhere});
  state.num_entries = 0;
  add_positions(state, 0, num_indexed);
}

void NgramIndex::require_appendable(TokenSpan tokens) const {
  tokens.require_valid("NgramIndex.append: tokens");
  if (tokens.size() > std::numeric_limits<int32_t>::max() - size()) {
    throw std::invalid_argument("NgramIndex.append: the text would exceed 2^31 tokens");
  }
}

void NgramIndex::append(TokenSpan tokens) {
  require_appendable(tokens);
  if (tokens.empty()) return;
  State& state = own_state();
  const int64_t old_size = size();
  state.tokens.resize(static_cast<size_t>(old_size + tokens.size()));
  tokens.copy_to(0, tokens.size(), state.tokens.data() + old_size);
  state.previous.resize(static_cast<size_t>(size() * width()));
  // In parts, because repetitive text needs far fewer entries than its length times the width.
  constexpr int64_t kPart = 1024;
  for (int64_t begin = old_size; begin < size(); begin += kPart) {
    const int64_t end = std::min(begin + kPart, size());
    const int64_t num_entries = state.num_entries + (end - begin) * width();
    if (num_entries > max_entries(state.table.size())) grow_table(state, num_entries, begin);
    add_positions(state, begin, end);
  }
}

void NgramIndex::truncate(int64_t length) {
  if (length < 0 || length > size()) {
    throw std::invalid_argument("NgramIndex.truncate: length: expected 0.." +
                                std::to_string(size()) + ", got " + std::to_string(length));
  }
  if (length == size()) return;
  State& state = own_state();
  for (int64_t end = size() - 1; end >= length; --end) remove_position(state, end);
  state.tokens.resize(static_cast<size_t>(length));
  state.previous.resize(static_cast<size_t>(length * width()));
}

// End of the latest earlier occurrence of the last n tokens, or kNowhere.
int64_t NgramIndex::previous_match(int64_t n) const {
  const State& state = *state_;
  const TokenId* const tokens = state.tokens.data();
  const int64_t end = size() - 1;
  int64_t candidate = state.previous[static_cast<size_t>(end * width() + n - min_n_)];
  while (candidate != kNowhere &&
         !std::equal(tokens + candidate + 1 - n, tokens + candidate + 1, tokens + end + 1 - n)) {
    candidate = state.previous[static_cast<size_t>(candidate * width() + n - min_n_)];
  }
  return candidate;
}

void NgramIndex::require_max_tokens(int64_t max_tokens) {
  if (max_tokens < 0) {
    throw std::invalid_argument("NgramIndex.propose: max_tokens: expected >= 0, got " +
                                std::to_string(max_tokens));
  }
}

Draft NgramIndex::propose(int64_t max_tokens) const {
  require_max_tokens(max_tokens);
  max_tokens = std::min(max_tokens, kMaxDraft);
  const std::vector<TokenId>& tokens = state_->tokens;
  for (int64_t n = std::min(max_n_, size() - 1); n >= min_n_; --n) {
    const int64_t match_end = previous_match(n);
    if (match_end == kNowhere) continue;
    const int64_t begin = match_end + 1;
    const bool overlaps = begin > size() - n;
    const int64_t length = overlaps ? max_tokens : std::min(max_tokens, size() - begin);
    Draft draft{{}, n};
    draft.tokens.reserve(static_cast<size_t>(length));
    for (int64_t i = begin; i < begin + length; ++i) {
      draft.tokens.push_back(i < size() ? tokens[static_cast<size_t>(i)]
                                        : draft.tokens[static_cast<size_t>(i - size())]);
    }
    return draft;
  }
  return {};
}

// Every chain, followed over collisions, must name the true previous occurrence, found here by
// comparing the n-grams themselves.
std::optional<std::string> NgramIndex::check_chains() const {
  const std::vector<TokenId>& tokens = state_->tokens;
  for (int64_t n = min_n_; n <= max_n_; ++n) {
    std::unordered_map<std::string, int64_t> last_end;
    for (int64_t end = 0; end < size(); ++end) {
      const auto stored = [&](int64_t position) {
        return int64_t{state_->previous[static_cast<size_t>(position * width() + n - min_n_)]};
      };
      const std::string name = "NgramIndex: previous occurrence of the " + std::to_string(n) +
                               "-gram that ends at " + std::to_string(end);
      if (end + 1 < n) {
        if (stored(end) != kNowhere) return name + " exists before the text is that long";
        continue;
      }
      const auto key_of = [&](int64_t position) {
        return std::string(
            reinterpret_cast<const char*>(&tokens[static_cast<size_t>(position + 1 - n)]),
            static_cast<size_t>(n) * sizeof(TokenId));
      };
      const std::string key = key_of(end);
      int64_t found = stored(end);
      for (int64_t above = end; found != kNowhere; above = found, found = stored(found)) {
        if (found < n - 1 || found >= above) return name + " is out of order";
        if (key_of(found) == key) break;
      }
      const auto truth = last_end.find(key);
      if (found != (truth == last_end.end() ? kNowhere : truth->second)) return name + " is wrong";
      last_end[key] = end;
    }
  }
  return std::nullopt;
}

// The table must be what indexing the text anew gives, bit for bit: else undoing was not exact.
std::optional<std::string> NgramIndex::check_table() const {
  State fresh;
  fresh.tokens = state_->tokens;
  fresh.previous.assign(state_->previous.size(), kNowhere);
  fresh.table.assign(state_->table.size(), Entry{0, kNowhere});
  add_positions(fresh, 0, size());
  if (fresh.num_entries != state_->num_entries) return "NgramIndex: num_entries is wrong";
  if (fresh.previous != state_->previous) return "NgramIndex: a chain differs from a fresh index";
  for (size_t slot = 0; slot < fresh.table.size(); ++slot) {
    const Entry& a = fresh.table[slot];
    const Entry& b = state_->table[slot];
    // The tag of an emptied entry means nothing.
    if (a.last != b.last || (a.last != kNowhere && a.tag != b.tag)) {
      return "NgramIndex: table entry " + std::to_string(slot) + " differs from a fresh index";
    }
  }
  return std::nullopt;
}

std::optional<std::string> NgramIndex::check_integrity() const {
  if (static_cast<int64_t>(state_->previous.size()) != size() * width()) {
    return "NgramIndex: chains and text differ in length";
  }
  if (state_->num_entries > max_entries(state_->table.size())) {
    return "NgramIndex: the table is too full";
  }
  if (auto problem = check_chains()) return problem;
  return check_table();
}

}  // namespace skv
