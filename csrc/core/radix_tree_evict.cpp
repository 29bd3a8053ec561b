// Order of use and eviction of the RadixTree.
#include <algorithm>
#include <limits>
#include <stdexcept>
#include <utility>

#include "csrc/core/assert.h"
#include "csrc/core/radix_tree.h"

namespace skv {

void RadixTree::touch(NodeHandle handle) {
  if (handle.tree != serial_) {
    throw std::invalid_argument("RadixTree.touch: match: expected a match of this tree");
  }
  if (handle.index < 0 || static_cast<size_t>(handle.index) >= nodes_.size()) return;
  const Node& node = at(handle.index);
  if (node.is_live && node.generation == handle.generation) touch_path(handle.index);
}

// Upwards, so that a parent ends up more recent than its child.
void RadixTree::touch_path(NodeIndex node) {
  for (NodeIndex i = node; i != kNone; i = at(i).parent) {
    if (!at(i).is_listed) continue;
    unlink(i);
    link_newest(i);
  }
}

void RadixTree::link_newest(NodeIndex index) {
  Node& node = at(index);
  node.older = newest_;
  node.newer = kNone;
  (newest_ == kNone ? oldest_ : at(newest_).newer) = index;
  newest_ = index;
  node.is_listed = true;
}

void RadixTree::link_newer_than(NodeIndex index, NodeIndex older) {
  Node& node = at(index);
  node.older = older;
  node.newer = at(older).newer;
  (node.newer == kNone ? newest_ : at(node.newer).older) = index;
  at(older).newer = index;
  node.is_listed = true;
}

void RadixTree::unlink(NodeIndex index) {
  Node& node = at(index);
  SKV_DEBUG_ASSERT(node.is_listed, "unlinking a node that is not in the list of use");
  (node.older == kNone ? oldest_ : at(node.older).newer) = node.newer;
  (node.newer == kNone ? newest_ : at(node.newer).older) = node.older;
  node.older = node.newer = kNone;
  node.is_listed = false;
}

int64_t RadixTree::evict(int64_t num_pages) {
  if (num_pages < 0) {
    throw std::invalid_argument("RadixTree.evict: num_pages: expected >= 0, got " +
                                std::to_string(num_pages));
  }
  const int64_t num_free_before = pool_.num_free();
  const int64_t target = num_free_before + std::min(num_pages, pool_.num_pages());
  // A parent that becomes a leaf lies further along the list, so one walk is enough.
  for (NodeIndex i = oldest_; i != kNone && pool_.num_free() < target;) {
    const NodeIndex next = at(i).newer;
    if (at(i).children.empty()) trim_leaf(i, target);
    i = next;
  }
  return pool_.num_free() - num_free_before;
}

int64_t RadixTree::evict_all() { return evict(std::numeric_limits<int64_t>::max()); }

// Takes pages from the end of a leaf until enough are free. Stops at a page that is held outside:
// dropping it would free nothing and lose a prefix that is in use.
void RadixTree::trim_leaf(NodeIndex index, int64_t free_target) {
  Node& leaf = at(index);
  while (!leaf.pages.empty() && pool_.num_free() < free_target &&
         !is_held_outside(leaf.pages.back())) {
    drop(std::span(leaf.pages).last(1));
    leaf.pages.pop_back();
    const int64_t page_begin =
        (first_page(leaf) + static_cast<int64_t>(leaf.pages.size())) * pool_.page_size();
    leaf.end = std::max(leaf.start, page_begin);
  }
  if (leaf.end == leaf.start) {
    remove_leaf(index);
  } else {
    compact_text(leaf);
  }
}

void RadixTree::remove_leaf(NodeIndex index) {
  Node& leaf = at(index);
  const NodeIndex parent = leaf.parent;
  unlink(index);
  at(parent).children.erase(*tokens_of(leaf));
  recycle(index);
  --num_nodes_;
  if (at(parent).parent != kNone) {
    compact_text(at(parent));
  } else if (at(parent).children.empty()) {
    // Roots without content go, so that keys seen once do not pile up.
    roots_.erase(at(parent).root_key);
    recycle(parent);
  }
}

// The next generation of the index makes old handles stale.
void RadixTree::recycle(NodeIndex index) {
  const uint32_t generation = at(index).generation + 1;
  at(index) = Node{};
  at(index).generation = generation;
  unused_.push_back(index);
}

// Gives back memory of a text whose greater part is evicted. Amortised by the eviction: at least
// as many tokens are dropped as are copied.
void RadixTree::compact_text(Node& node) {
  const int64_t length = node.end - node.start;
  if (node.text.use_count() != 1 || static_cast<int64_t>(node.text->size()) < 2 * length) return;
  node.text =
      std::make_shared<const std::vector<TokenId>>(tokens_of(node), tokens_of(node) + length);
  node.text_begin = 0;
}

int64_t RadixTree::num_evictable_pages() const {
  std::vector<bool> is_held(tree_refs_.size());
  for (size_t page = 0; page < is_held.size(); ++page) {
    is_held[page] = is_held_outside(static_cast<PageId>(page));
  }
  return count_evictable(is_held);
}

int64_t RadixTree::num_blocked_pages(std::span<const PageId> kept) const {
  std::vector<bool> is_held(tree_refs_.size(), false);
  int64_t num_kept = 0;  // distinct kept pages that the tree holds too
  for (const PageId page : kept) {
    if (page < 0 || page >= pool_.num_pages()) {
      throw std::out_of_range("RadixTree.num_blocked_pages: page " + std::to_string(page) +
                              " is not in the pool");
    }
    const auto index = static_cast<size_t>(page);
    if (!is_held[index] && tree_refs_[index] > 0) ++num_kept;
    is_held[index] = true;
  }
  return num_tree_pages_ - num_kept - count_evictable(is_held);
}

// The same walk as evict(), on paper.
int64_t RadixTree::count_evictable(const std::vector<bool>& is_held) const {
  std::vector<int64_t> num_dropped(tree_refs_.size(), 0);
  std::vector<size_t> num_children_gone(nodes_.size(), 0);
  int64_t num_evictable = 0;
  for (NodeIndex i = oldest_; i != kNone; i = at(i).newer) {
    const Node& node = at(i);
    if (num_children_gone[static_cast<size_t>(i)] != node.children.size()) continue;
    size_t num_left = node.pages.size();
    while (num_left > 0 && !is_held[static_cast<size_t>(node.pages[num_left - 1])]) {
      const auto page = static_cast<size_t>(node.pages[--num_left]);
      if (++num_dropped[page] == tree_refs_[page]) ++num_evictable;
    }
    if (num_left == 0) ++num_children_gone[static_cast<size_t>(node.parent)];
  }
  return num_evictable;
}

int64_t RadixTree::num_pinned_pages() const {
  std::vector<bool> is_pinned(tree_refs_.size(), false);
  int64_t num_pinned = 0;
  for (const Node& node : nodes_) {
    if (node.num_pins == 0) continue;
    for (const PageId page : node.pages) {
      if (!is_pinned[static_cast<size_t>(page)]) ++num_pinned;
      is_pinned[static_cast<size_t>(page)] = true;
    }
  }
  return num_pinned;
}

}  // namespace skv
