#include "csrc/core/references.h"

#include <vector>

namespace skv {

std::optional<std::string> check_references(const PagePool& pool, const SequenceTable* table,
                                            std::span<const RadixTree* const> trees) {
  std::vector<int64_t> counts(static_cast<size_t>(pool.num_pages()), 0);
  if (table != nullptr) table->count_references(counts);
  for (const RadixTree* tree : trees) tree->count_references(counts);
  for (size_t i = 0; i < counts.size(); ++i) {
    const auto page = static_cast<PageId>(i);
    if (pool.ref_count(page) != counts[i]) {
      return "page " + std::to_string(page) + ": the pool counts " +
             std::to_string(pool.ref_count(page)) + " references, sequences and trees hold " +
             std::to_string(counts[i]);
    }
  }
  return std::nullopt;
}

}  // namespace skv
