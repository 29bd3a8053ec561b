// A set of pages that is emptied in O(1): the scratch with which long page lists are checked for
// repetitions without allocating on every call.
#pragma once

#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "csrc/core/ids.h"

namespace skv {

class PageMarks {
 public:
  // Throws std::invalid_argument when a page stands twice in the joined list of head and tail.
  // All pages must lie in [0, num_pages). O(pages).
  void require_distinct(std::span<const PageId> head, std::span<const PageId> tail,
                        int64_t num_pages) {
    marks_.resize(static_cast<size_t>(num_pages), 0);
    ++current_;
    for (const std::span<const PageId> pages : {head, tail}) {
      for (const PageId page : pages) {
        uint64_t& mark = marks_[static_cast<size_t>(page)];
        if (mark == current_) {
          throw std::invalid_argument("page " + std::to_string(page) + " stands twice in one list");
        }
        mark = current_;
      }
    }
  }

 private:
  std::vector<uint64_t> marks_;  // marks_[page] == current_ means "in the set"
  uint64_t current_ = 0;
};

}  // namespace skv
