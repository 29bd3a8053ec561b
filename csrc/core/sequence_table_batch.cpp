// The calls of SequenceTable that take a whole batch.
#include <algorithm>
#include <stdexcept>
#include <unordered_map>
#include <unordered_set>

#include "csrc/core/assert.h"
#include "csrc/core/checked_math.h"
#include "csrc/core/sequence_table.h"

namespace skv {

// One value for each sequence, and no sequence twice.
void SequenceTable::require_batch(const char* what, std::span<const SequenceId> seqs,
                                  size_t num_values) {
  const std::string name = std::string("SequenceTable.") + what;
  if (seqs.size() != num_values) {
    throw std::invalid_argument(name + ": expected " + std::to_string(seqs.size()) +
                                " entries, one a sequence, got " + std::to_string(num_values));
  }
  std::unordered_set<SequenceId> seen;
  for (const SequenceId seq : seqs) {
    if (!seen.insert(seq).second) {
      throw std::invalid_argument(name + ": sequence " + std::to_string(seq) +
                                  " stands twice in the batch");
    }
  }
}

// Whether reserve() for one sequence after the other would find enough free pages each time. Throws
// what the first bad one of those calls would throw.
template <typename Count>
bool SequenceTable::can_reserve(std::span<const SequenceId> seqs,
                                std::span<const Count> num_tokens) const {
  for (size_t s = 0; s < seqs.size(); ++s) pages_needed(seqs[s], num_tokens[s]);
  int64_t num_free = pool_.num_free();
  // References that the sequences before would have given up by now.
  std::unordered_map<PageId, int64_t> num_released;
  const auto num_holders = [&](PageId page) {
    const auto found = num_released.find(page);
    return pool_.ref_count(page) - (found == num_released.end() ? 0 : found->second);
  };
  for (size_t s = 0; s < seqs.size(); ++s) {
    const Sequence& sequence = find(seqs[s]);
    const std::vector<PageId>& pages = sequence.pages();
    const int64_t n = num_tokens[s];
    const auto first = static_cast<size_t>(sequence.committed_len / pool_.page_size());
    const bool is_shared = n > 0 && first < pages.size() && num_holders(pages[first]) > 1;
    const auto num_kept = static_cast<size_t>(pages_for(sequence.committed_len + n));
    const int64_t num_missing =
        std::max<int64_t>(static_cast<int64_t>(num_kept) - static_cast<int64_t>(pages.size()), 0);
    num_free -= num_missing + (is_shared ? 1 : 0);
    if (num_free < 0) return false;
    if (is_shared) ++num_released[pages[first]];
    for (size_t i = num_kept; i < pages.size(); ++i) {
      if (num_holders(pages[i]) == 1) ++num_free;
      ++num_released[pages[i]];
    }
  }
  return true;
}

std::optional<std::vector<PageCopy>> SequenceTable::reserve_batch(
    std::span<const SequenceId> seqs, std::span<const int64_t> num_tokens) {
  require_batch("reserve_batch: num_tokens", seqs, num_tokens.size());
  if (!can_reserve(seqs, num_tokens)) return std::nullopt;
  std::vector<PageCopy> copies;
  copies.reserve(seqs.size());
  for (size_t s = 0; s < seqs.size(); ++s) {
    const auto more = reserve(seqs[s], num_tokens[s]);
    SKV_ASSERT(more, "reserve found fewer free pages than were counted for the batch");
    copies.insert(copies.end(), more->begin(), more->end());
  }
  return copies;
}

void SequenceTable::commit_batch(std::span<const SequenceId> seqs,
                                 std::span<const int64_t> num_tokens) {
  require_batch("commit_batch: num_tokens", seqs, num_tokens.size());
  for (size_t s = 0; s < seqs.size(); ++s) {
    require_reserved("commit_batch: num_tokens", seqs[s], num_tokens[s]);
  }
  for (size_t s = 0; s < seqs.size(); ++s) commit(seqs[s], num_tokens[s]);
}

BatchShape SequenceTable::shape_of(std::span<const SequenceId> seqs,
                                   std::span<const int32_t> query_lens) const {
  BatchShape shape;
  for (size_t s = 0; s < seqs.size(); ++s) {
    shape.num_rows += query_lens[s];
    shape.max_pages = std::max(shape.max_pages, pages_for(length(seqs[s]) + query_lens[s]));
  }
  checked_cast<int32_t>(shape.num_rows, "SequenceTable: number of rows of a batch");
  return shape;
}

BatchShape SequenceTable::plan_batch(std::span<const SequenceId> seqs,
                                     std::span<const int32_t> query_lens) const {
  require_batch("fill_batch: query_lens", seqs, query_lens.size());
  for (size_t s = 0; s < seqs.size(); ++s) {
    require_reserved("fill_batch: query_lens", seqs[s], query_lens[s]);
  }
  return shape_of(seqs, query_lens);
}

std::optional<BatchShape> SequenceTable::plan_reserve(std::span<const SequenceId> seqs,
                                                      std::span<const int32_t> query_lens) const {
  require_batch("prepare_batch: query_lens", seqs, query_lens.size());
  if (!can_reserve(seqs, query_lens)) return std::nullopt;
  return shape_of(seqs, query_lens);
}

void SequenceTable::fill_batch(std::span<const SequenceId> seqs,
                               std::span<const int32_t> query_lens, const BatchShape& shape,
                               const BatchArrays& out) const {
  const int64_t page_size = pool_.page_size();
  int64_t row = 0;
  out.query_offsets[0] = 0;
  for (size_t s = 0; s < seqs.size(); ++s) {
    const Sequence& sequence = find(seqs[s]);
    const int64_t seq_len = sequence.committed_len + query_lens[s];
    const int64_t num_pages = pages_for(seq_len);
    int32_t* const pages = out.page_table + static_cast<int64_t>(s) * shape.max_pages;
    std::copy_n(sequence.pages().begin(), num_pages, pages);
    std::fill(pages + num_pages, pages + shape.max_pages, -1);
    for (int64_t position = sequence.committed_len; position < seq_len; ++position, ++row) {
      out.positions[row] = static_cast<int32_t>(position);
      out.slots[row] = pages[position / page_size] * page_size + position % page_size;
    }
    out.seq_lens[s] = static_cast<int32_t>(seq_len);
    out.query_offsets[s + 1] = static_cast<int32_t>(row);
  }
}

}  // namespace skv
