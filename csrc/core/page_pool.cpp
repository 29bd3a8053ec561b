#include "csrc/core/page_pool.h"

#include <limits>
#include <stdexcept>

namespace skv {
namespace {

// Far below the counter's range, so that one call with repeated pages cannot wrap it either.
constexpr uint32_t kMaxReferences = uint32_t{1} << 30;

}  // namespace

// Slots of any legal pool fit, so the product of the two sizes needs no check of its own.
static_assert(std::numeric_limits<SlotId>::max() / std::numeric_limits<int32_t>::max() >=
              std::numeric_limits<PageId>::max());

PagePool::PagePool(int64_t num_pages, int64_t page_size) : page_size_(page_size) {
  if (num_pages < 0 || num_pages > std::numeric_limits<PageId>::max()) {
    throw std::invalid_argument("PagePool: num_pages: expected 0..2^31-1, got " +
                                std::to_string(num_pages));
  }
  if (page_size < 1 || page_size > std::numeric_limits<int32_t>::max()) {
    throw std::invalid_argument("PagePool: page_size: expected 1..2^31-1, got " +
                                std::to_string(page_size));
  }
  ref_counts_.assign(static_cast<size_t>(num_pages), 0);
  free_.reserve(static_cast<size_t>(num_pages));
  for (int64_t page = num_pages - 1; page >= 0; --page) {
    free_.push_back(static_cast<PageId>(page));
  }
}

std::optional<std::vector<PageId>> PagePool::allocate(int64_t n) {
  if (n < 0) {
    throw std::invalid_argument("PagePool.allocate: n: expected >= 0, got " + std::to_string(n));
  }
  if (n > num_free()) return std::nullopt;
  std::vector<PageId> pages(free_.rbegin(), free_.rbegin() + n);
  free_.resize(free_.size() - static_cast<size_t>(n));
  for (const PageId page : pages) ref_counts_[static_cast<size_t>(page)] = 1;
  return pages;
}

void PagePool::require_held(std::span<const PageId> pages) const {
  for (const PageId page : pages) {
    if (!is_page(page)) throw_unusable(page);
    // One comparison refuses both 0 (free) and a count near the limit.
    const uint32_t count = ref_counts_[static_cast<size_t>(page)];
    if (count - 1 >= kMaxReferences) throw_unusable(page);
  }
}

void PagePool::retain(std::span<const PageId> pages) {
  require_held(pages);
  for (const PageId page : pages) ++ref_counts_[static_cast<size_t>(page)];
}

void PagePool::release(std::span<const PageId> pages) {
  // Works backwards so that the free stack hands the pages out in their old order. A page may
  // stand in `pages` more often than it is held; only counting down finds that, so a failure is
  // undone instead of foreseen.
  const size_t old_num_free = free_.size();
  for (size_t i = pages.size(); i-- > 0;) {
    const PageId page = pages[i];
    if (!is_page(page) || ref_counts_[static_cast<size_t>(page)] == 0) {
      free_.resize(old_num_free);
      for (size_t j = i + 1; j < pages.size(); ++j) ++ref_counts_[static_cast<size_t>(pages[j])];
      if (!is_page(page)) throw_unusable(page);
      throw_not_held(page);
    }
    if (--ref_counts_[static_cast<size_t>(page)] == 0) free_.push_back(page);
  }
}

int64_t PagePool::ref_count(PageId page) const {
  if (!is_page(page)) throw_unusable(page);
  return ref_counts_[static_cast<size_t>(page)];
}

void PagePool::throw_not_held(PageId page) {
  throw std::invalid_argument("page " + std::to_string(page) +
                              " is not held: released more often than retained");
}

void PagePool::throw_unusable(PageId page) const {
  const std::string name = "page " + std::to_string(page);
  if (!is_page(page)) {
    throw std::out_of_range(name + " is not in the pool of " + std::to_string(num_pages()) +
                            " pages");
  }
  if (ref_counts_[static_cast<size_t>(page)] == 0) throw_not_held(page);
  throw std::invalid_argument(name + " has too many references");
}

std::optional<std::string> PagePool::check_integrity() const {
  std::vector<bool> is_free(ref_counts_.size(), false);
  for (const PageId page : free_) {
    const std::string name = "PagePool: page " + std::to_string(page);
    if (!is_page(page)) return name + " in the free list is not in the pool";
    if (is_free[static_cast<size_t>(page)]) return name + " is twice in the free list";
    if (ref_counts_[static_cast<size_t>(page)] != 0) return name + " is free but has references";
    is_free[static_cast<size_t>(page)] = true;
  }
  for (size_t page = 0; page < ref_counts_.size(); ++page) {
    const std::string name = "PagePool: page " + std::to_string(page);
    if (ref_counts_[page] == 0 && !is_free[page]) return name + " is lost: neither free nor held";
    if (ref_counts_[page] > kMaxReferences) return name + " has an impossible reference count";
  }
  return std::nullopt;
}

}  // namespace skv
