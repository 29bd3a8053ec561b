// Free list and reference counts of the pages of one KV pool. Knows nothing of tokens or bytes.
//
// A page is free (count 0, once in the free list) or held (count >= 1). allocate() gives pages
// with count 1, retain() adds one, release() takes one; the last release makes the page free.
//
//   Every call either does all it was asked or changes nothing: an unknown page throws
//   std::out_of_range, a page that is not held (double release) std::invalid_argument.
//
// All calls are O(pages given). Not thread safe: the engine thread owns the pool.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "csrc/core/ids.h"

namespace skv {

class PagePool {
 public:
  // 0 <= num_pages < 2^31 and 1 <= page_size < 2^31, so that every slot
  // (page * page_size + offset) fits SlotId; else std::invalid_argument.
  PagePool(int64_t num_pages, int64_t page_size);
  PagePool(const PagePool&) = delete;
  PagePool& operator=(const PagePool&) = delete;

  // n pages with count 1, or std::nullopt when fewer than n are free. n < 0 is invalid.
  std::optional<std::vector<PageId>> allocate(int64_t n);

  // One more reference for each entry; a page may stand in `pages` more than once.
  void retain(std::span<const PageId> pages);

  // One reference less for each entry. Pages that became free are handed out again in the order
  // they have in `pages`.
  void release(std::span<const PageId> pages);

  int64_t ref_count(PageId page) const;
  int64_t num_free() const { return static_cast<int64_t>(free_.size()); }
  int64_t num_pages() const { return static_cast<int64_t>(ref_counts_.size()); }
  int64_t page_size() const { return page_size_; }

  // Throws what retain() would throw, without retaining.
  void require_held(std::span<const PageId> pages) const;

  // Describes the first violation found. O(num_pages).
  std::optional<std::string> check_integrity() const;

 private:
  friend class PagePoolTestPeer;
  friend class SequenceTable;

  // retain() of pages that the caller itself holds, so nothing needs checking: fork() of a long
  // sequence is this loop.
  void retain_held(std::span<const PageId> pages) {
    for (const PageId page : pages) ++ref_counts_[static_cast<size_t>(page)];
  }

  bool is_page(PageId page) const {
    return static_cast<size_t>(static_cast<uint32_t>(page)) < ref_counts_.size();
  }
  [[noreturn]] static void throw_not_held(PageId page);
  [[noreturn]] void throw_unusable(PageId page) const;

  int64_t page_size_;
  std::vector<uint32_t> ref_counts_;  // [num_pages]
  std::vector<PageId> free_;          // stack of free pages; capacity num_pages, so never grows
};

}  // namespace skv
