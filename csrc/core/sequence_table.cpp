#include "csrc/core/sequence_table.h"

#include <algorithm>
#include <stdexcept>
#include <unordered_set>
#include <utility>

#include "csrc/core/assert.h"
#include "csrc/core/checked_math.h"

namespace skv {
namespace {

[[noreturn]] void throw_expected(const char* what, const std::string& expected, int64_t got) {
  throw std::invalid_argument(std::string("SequenceTable.") + what + ": expected " + expected +
                              ", got " + std::to_string(got));
}

// Lengths above this would overflow int32 positions long before the pool could hold them.
constexpr int64_t kMaxLength = int64_t{1} << 31;

}  // namespace

SequenceTable::SequenceTable(PagePool& pool) : pool_(pool) {}

SequenceTable::~SequenceTable() {
  for (auto& [id, sequence] : sequences_) {
    try {
      pool_.release(sequence.pages());
    } catch (const std::exception&) {
      // A destructor does not raise; the pool's own check_integrity() reports what is wrong.
    }
  }
}

int64_t SequenceTable::pages_for(int64_t num_tokens) const {
  return ceil_div(num_tokens, pool_.page_size());
}

const SequenceTable::Sequence& SequenceTable::find(SequenceId seq) const {
  const auto found = sequences_.find(seq);
  if (found != sequences_.end()) return found->second;
  const std::string name = "sequence " + std::to_string(seq);
  if (seq >= 0 && seq < next_id_) throw std::invalid_argument(name + " is already released");
  throw std::out_of_range(name + " does not exist");
}

SequenceId SequenceTable::add(Sequence sequence) {
  sequences_.emplace(next_id_, std::move(sequence));
  return next_id_++;
}

SequenceId SequenceTable::create() { return add(Sequence{}); }

SequenceId SequenceTable::adopt(std::span<const PageId> pages, int64_t num_tokens) {
  if (num_tokens < 0 || num_tokens >= kMaxLength) {
    throw_expected("adopt: num_tokens", "0..2^31-1", num_tokens);
  }
  if (static_cast<int64_t>(pages.size()) != pages_for(num_tokens)) {
    throw_expected("adopt: pages",
                   std::to_string(pages_for(num_tokens)) + " pages for " +
                       std::to_string(num_tokens) + " tokens",
                   static_cast<int64_t>(pages.size()));
  }
  pool_.require_held(pages);
  marks_.require_distinct(pages, {}, pool_.num_pages());
  Sequence sequence{std::make_shared<std::vector<PageId>>(pages.begin(), pages.end()), num_tokens,
                    num_tokens};
  pool_.retain(pages);
  return add(std::move(sequence));
}

bool SequenceTable::writes_shared_page(const Sequence& sequence, int64_t n) const {
  const auto first = static_cast<size_t>(sequence.committed_len / pool_.page_size());
  return n > 0 && first < sequence.pages().size() && pool_.ref_count(sequence.pages()[first]) > 1;
}

int64_t SequenceTable::pages_needed(SequenceId seq, int64_t n) const {
  const Sequence& sequence = find(seq);
  if (n < 0 || n >= kMaxLength - sequence.committed_len) {
    throw_expected("reserve: n", "0 <= n and a length below 2^31", n);
  }
  const int64_t missing =
      pages_for(sequence.committed_len + n) - static_cast<int64_t>(sequence.pages().size());
  return std::max<int64_t>(missing, 0) + (writes_shared_page(sequence, n) ? 1 : 0);
}

std::optional<std::vector<PageCopy>> SequenceTable::reserve(SequenceId seq, int64_t n) {
  const int64_t num_fresh = pages_needed(seq, n);
  Sequence& sequence = find(seq);
  const int64_t new_len = sequence.committed_len + n;
  std::optional<std::vector<PageId>> fresh = pool_.allocate(num_fresh);
  if (!fresh) return std::nullopt;

  std::vector<PageCopy> copies;
  size_t num_used = 0;
  if (writes_shared_page(sequence, n)) {
    PageId& page =
        sequence.own_pages()[static_cast<size_t>(sequence.committed_len / pool_.page_size())];
    const PageId shared = std::exchange(page, (*fresh)[num_used++]);
    if (sequence.committed_len % pool_.page_size() != 0) copies.push_back({shared, page});
    // The other holders keep it alive, so its bytes stay until the caller has copied them.
    pool_.release(std::span(&shared, 1));
  }
  if (num_used < fresh->size()) {
    std::vector<PageId>& pages = sequence.own_pages();
    pages.insert(pages.end(), fresh->begin() + static_cast<int64_t>(num_used), fresh->end());
  }
  drop_tail(sequence, new_len);
  return copies;
}

// Keeps the pages of the first new_len tokens and makes that the allocated length.
void SequenceTable::drop_tail(Sequence& sequence, int64_t new_len) {
  const auto num_kept = static_cast<size_t>(pages_for(new_len));
  SKV_ASSERT(num_kept <= sequence.pages().size(), "a sequence lacks pages for its own length");
  pool_.release(std::span(sequence.pages()).subspan(num_kept));
  if (num_kept < sequence.pages().size()) sequence.own_pages().resize(num_kept);
  sequence.allocated_len = new_len;
}

const SequenceTable::Sequence& SequenceTable::require_reserved(const char* what, SequenceId seq,
                                                               int64_t n) const {
  const Sequence& sequence = find(seq);
  const int64_t reserved = sequence.allocated_len - sequence.committed_len;
  if (n < 0 || n > reserved) {
    throw_expected(
        what, "0.." + std::to_string(reserved) + " (reserved) for sequence " + std::to_string(seq),
        n);
  }
  return sequence;
}

void SequenceTable::commit(SequenceId seq, int64_t n) {
  require_reserved("commit: n", seq, n);
  Sequence& sequence = find(seq);
  sequence.committed_len += n;
  drop_tail(sequence, sequence.committed_len);
}

void SequenceTable::truncate(SequenceId seq, int64_t length) {
  Sequence& sequence = find(seq);
  if (length < 0 || length > sequence.committed_len) {
    throw_expected("truncate: length", "0.." + std::to_string(sequence.committed_len), length);
  }
  sequence.committed_len = length;
  drop_tail(sequence, length);
}

SequenceId SequenceTable::fork(SequenceId seq) {
  const Sequence& parent = find(seq);
  if (parent.allocated_len != parent.committed_len) {
    throw_expected("fork: reserved tokens", "0 (commit or truncate first)",
                   parent.allocated_len - parent.committed_len);
  }
  pool_.retain_held(parent.pages());
  return add(parent);
}

void SequenceTable::release(SequenceId seq) {
  pool_.release(find(seq).pages());
  sequences_.erase(seq);
}

void SequenceTable::replace_prefix(SequenceId seq, std::span<const PageId> pages) {
  Sequence& sequence = find(seq);
  const int64_t num_full = sequence.committed_len / pool_.page_size();
  if (static_cast<int64_t>(pages.size()) > num_full) {
    throw_expected("replace_prefix: pages", "at most " + std::to_string(num_full) + " full pages",
                   static_cast<int64_t>(pages.size()));
  }
  pool_.require_held(pages);
  marks_.require_distinct(pages, std::span(sequence.pages()).subspan(pages.size()),
                          pool_.num_pages());
  pool_.retain(pages);
  pool_.release(std::span(sequence.pages()).first(pages.size()));
  std::copy(pages.begin(), pages.end(), sequence.own_pages().begin());
}

std::vector<SequenceId> SequenceTable::sequence_ids() const {
  std::vector<SequenceId> ids;
  ids.reserve(sequences_.size());
  for (const auto& [id, sequence] : sequences_) ids.push_back(id);
  std::sort(ids.begin(), ids.end());
  return ids;
}

std::optional<std::string> SequenceTable::check_integrity() const {
  std::vector<int64_t> counts(static_cast<size_t>(pool_.num_pages()), 0);
  for (const auto& [id, sequence] : sequences_) {
    const std::string name = "SequenceTable: sequence " + std::to_string(id);
    if (id < 0 || id >= next_id_) return name + " has an id that was never given";
    if (sequence.committed_len < 0 || sequence.committed_len > sequence.allocated_len) {
      return name + ": committed_len is not in 0..allocated_len";
    }
    if (static_cast<int64_t>(sequence.pages().size()) != pages_for(sequence.allocated_len)) {
      return name + ": page count does not fit allocated_len";
    }
    std::unordered_set<PageId> seen;
    for (const PageId page : sequence.pages()) {
      const std::string page_name = name + ": page " + std::to_string(page);
      if (page < 0 || page >= pool_.num_pages()) return page_name + " is not in the pool";
      if (!seen.insert(page).second) return page_name + " stands twice in its table";
      if (++counts[static_cast<size_t>(page)] > pool_.ref_count(page)) {
        return page_name + " is held by more sequences than it has references";
      }
    }
    for (int64_t i = sequence.committed_len / pool_.page_size();
         sequence.committed_len < sequence.allocated_len && i < pages_for(sequence.allocated_len);
         ++i) {
      const PageId page = sequence.pages()[static_cast<size_t>(i)];
      if (pool_.ref_count(page) > 1) {
        return name + ": page " + std::to_string(page) + " is reserved for writing but shared";
      }
    }
  }
  return std::nullopt;
}

void SequenceTable::count_references(std::span<int64_t> counts) const {
  for (const auto& [id, sequence] : sequences_) {
    for (const PageId page : sequence.pages()) ++counts[static_cast<size_t>(page)];
  }
}

}  // namespace skv
