// The sum over all owners: no page leaks and none is held by nobody.
#pragma once

#include <optional>
#include <span>
#include <string>

#include "csrc/core/page_pool.h"
#include "csrc/core/radix_tree.h"
#include "csrc/core/sequence_table.h"

namespace skv {

// Recounts every page's holders in the table (may be null) and the trees from scratch, compares
// with the pool's reference counts and describes the first difference. Only true while nothing
// else holds references, that is between steps. O(all pages held + pool pages).
std::optional<std::string> check_references(const PagePool& pool, const SequenceTable* table,
                                            std::span<const RadixTree* const> trees);

}  // namespace skv
