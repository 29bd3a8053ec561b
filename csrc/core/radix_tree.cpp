#include "csrc/core/radix_tree.h"

#include <atomic>
#include <stdexcept>
#include <utility>

#include "csrc/core/assert.h"
#include "csrc/core/checked_math.h"

namespace skv {
namespace {

uint64_t next_serial() {
  static std::atomic<uint64_t> last{0};
  return last.fetch_add(1, std::memory_order_relaxed) + 1;
}

}  // namespace

RadixTree::RadixTree(PagePool& pool)
    : pool_(pool), serial_(next_serial()), tree_refs_(static_cast<size_t>(pool.num_pages()), 0) {}

RadixTree::~RadixTree() {
  for (const Node& node : nodes_) {
    try {
      pool_.release(node.pages);
    } catch (const std::exception&) {
      // A destructor does not raise; the pool's own check_integrity() reports what is wrong.
    }
  }
}

RadixTree::Walk RadixTree::walk(RootKey root_key, TokenSpan tokens) const {
  Walk walk;
  const auto root = roots_.find(root_key);
  if (root == roots_.end()) return walk;
  walk.node = root->second;
  while (walk.num_tokens < tokens.size()) {
    const int64_t next = tokens[walk.num_tokens];
    if (!std::in_range<TokenId>(next)) break;
    const auto& children = at(walk.node).children;
    const auto found = children.find(static_cast<TokenId>(next));
    if (found == children.end()) break;
    const Node& child = at(found->second);
    const int64_t length = child.end - child.start;
    const int64_t run = tokens.common_prefix(walk.num_tokens, tokens_of(child), length);
    walk.node = found->second;
    walk.num_tokens += run;
    // The child's pages take over from the index where it starts, inside that page too.
    const int64_t num_pages = ceil_div(walk.num_tokens, pool_.page_size());
    walk.pages.resize(static_cast<size_t>(first_page(child)));
    walk.pages.insert(walk.pages.end(), child.pages.begin(),
                      child.pages.begin() + (num_pages - first_page(child)));
    if (run < length) break;
  }
  return walk;
}

Match RadixTree::match(RootKey root_key, TokenSpan tokens) const {
  Walk found = walk(root_key, tokens);
  Match match{found.num_tokens, std::move(found.pages), {serial_}};
  if (found.num_tokens > 0) match.node = {serial_, found.node, at(found.node).generation};
  return match;
}

void RadixTree::require_insertable(TokenSpan tokens, std::span<const PageId> pages) {
  tokens.require_valid("RadixTree.insert: tokens");
  const int64_t num_pages = ceil_div(tokens.size(), pool_.page_size());
  if (static_cast<int64_t>(pages.size()) != num_pages) {
    throw std::invalid_argument("RadixTree.insert: pages: expected " + std::to_string(num_pages) +
                                " for " + std::to_string(tokens.size()) + " tokens, got " +
                                std::to_string(pages.size()));
  }
  pool_.require_held(pages);
  marks_.require_distinct(pages, {}, pool_.num_pages());
}

InsertResult RadixTree::insert(RootKey root_key, TokenSpan tokens, std::span<const PageId> pages) {
  require_insertable(tokens, pages);
  if (tokens.empty()) return {};
  Walk found = walk(root_key, tokens);
  NodeIndex deepest = found.node;
  if (found.num_tokens < tokens.size()) {
    NodeIndex parent = deepest == kNone ? root_of(root_key) : deepest;
    if (found.num_tokens < at(parent).end) parent = split(parent, found.num_tokens);
    add_leaf(parent, tokens, pages);
    deepest = at(parent).children.at(static_cast<TokenId>(tokens[found.num_tokens]));
    const int64_t num_kept = found.num_tokens / pool_.page_size();
    found.pages.resize(static_cast<size_t>(num_kept));
    found.pages.insert(found.pages.end(), pages.begin() + num_kept, pages.end());
  }
  touch_path(deepest);
  return {found.num_tokens, std::move(found.pages)};
}

RadixTree::NodeIndex RadixTree::new_node() {
  NodeIndex index = kNone;
  if (unused_.empty()) {
    index = checked_cast<NodeIndex>(static_cast<int64_t>(nodes_.size()), "RadixTree: nodes");
    nodes_.emplace_back();
  } else {
    index = unused_.back();
    unused_.pop_back();
  }
  at(index).is_live = true;
  return index;
}

RadixTree::NodeIndex RadixTree::root_of(RootKey root_key) {
  const auto [found, is_new] = roots_.try_emplace(root_key, kNone);
  if (is_new) {
    found->second = new_node();
    at(found->second).root_key = root_key;
  }
  return found->second;
}

// Divides `lower` at an absolute position inside it and returns the new upper half. The lower half
// keeps its identity, so handles and pins of it stay right: they cover the path to its end.
RadixTree::NodeIndex RadixTree::split(NodeIndex lower_index, int64_t position) {
  const NodeIndex upper_index = new_node();
  Node& lower = at(lower_index);
  Node& upper = at(upper_index);
  const int64_t num_lower_from = position / pool_.page_size() - first_page(lower);
  const int64_t num_upper = ceil_div(position, pool_.page_size()) - first_page(lower);
  upper.text = lower.text;
  upper.text_begin = lower.text_begin;
  upper.start = lower.start;
  upper.end = position;
  upper.parent = lower.parent;
  upper.num_pins = lower.num_pins;
  upper.pages.assign(lower.pages.begin(), lower.pages.begin() + num_upper);
  lower.pages.erase(lower.pages.begin(), lower.pages.begin() + num_lower_from);
  if (num_upper > num_lower_from) hold(std::span(upper.pages).last(1));

  at(upper.parent).children[*tokens_of(upper)] = upper_index;
  lower.text_begin += position - lower.start;
  lower.start = position;
  lower.parent = upper_index;
  upper.children.emplace(*tokens_of(lower), lower_index);
  ++num_nodes_;
  if (lower.is_listed) link_newer_than(upper_index, lower_index);
  return upper_index;
}

// Hangs tokens [end of parent, size) below `parent`. `pages` are those of the whole path.
void RadixTree::add_leaf(NodeIndex parent_index, TokenSpan tokens, std::span<const PageId> pages) {
  const NodeIndex leaf_index = new_node();
  Node& leaf = at(leaf_index);
  Node& parent = at(parent_index);
  leaf.start = parent.end;
  leaf.end = tokens.size();
  leaf.parent = parent_index;
  auto text = std::make_shared<std::vector<TokenId>>(static_cast<size_t>(leaf.end - leaf.start));
  tokens.copy_to(leaf.start, leaf.end, text->data());
  leaf.text = std::move(text);
  leaf.pages.assign(pages.begin() + first_page(leaf), pages.end());
  hold(leaf.pages);
  parent.children.emplace(*tokens_of(leaf), leaf_index);
  ++num_nodes_;
  link_newest(leaf_index);
  fold_partial_page(leaf_index);
}

// The leaf's first page repeats the partly filled page that the path above ends in. If only this
// path uses the old page inside the tree, let the path use the leaf's instead: the old one becomes
// free as soon as nobody outside holds it. The steps are bounded by the tokens of one page.
void RadixTree::fold_partial_page(NodeIndex leaf_index) {
  const Node& leaf = at(leaf_index);
  if (leaf.start % pool_.page_size() == 0) return;
  const PageId copy = leaf.pages.front();
  const PageId old = at(leaf.parent).pages.back();
  if (copy == old) return;
  std::vector<NodeIndex> holders;
  for (NodeIndex i = leaf.parent; !at(i).pages.empty() && at(i).pages.back() == old;
       i = at(i).parent) {
    holders.push_back(i);
  }
  if (static_cast<int64_t>(holders.size()) != tree_refs_[static_cast<size_t>(old)]) return;
  for (const NodeIndex i : holders) {
    at(i).pages.back() = copy;
    hold(std::span(&copy, 1));
    drop(std::span(&old, 1));
  }
}

PinId RadixTree::pin(RootKey root_key, TokenSpan tokens) {
  const Walk found = walk(root_key, tokens);
  Pin pin{kNone, found.num_tokens};
  if (found.num_tokens > 0) {
    pin.node = found.node;
    // Without the split a pinned system prompt would protect whatever conversation came first.
    if (found.num_tokens < at(found.node).end) pin.node = split(found.node, found.num_tokens);
    for (NodeIndex i = pin.node; i != kNone; i = at(i).parent) {
      ++at(i).num_pins;
      if (at(i).is_listed) unlink(i);
    }
  }
  pins_.emplace(next_pin_, pin);
  return next_pin_++;
}

const RadixTree::Pin& RadixTree::find_pin(PinId pin) const {
  const auto found = pins_.find(pin);
  if (found != pins_.end()) return found->second;
  const std::string name = "RadixTree: pin " + std::to_string(pin);
  if (pin >= 0 && pin < next_pin_) throw std::invalid_argument(name + " is already released");
  throw std::out_of_range(name + " does not exist");
}

int64_t RadixTree::pinned_length(PinId pin) const { return find_pin(pin).length; }

void RadixTree::unpin(PinId pin) {
  // Upwards, so that a parent becomes more recent than its child.
  for (NodeIndex i = find_pin(pin).node; i != kNone; i = at(i).parent) {
    if (--at(i).num_pins == 0 && at(i).parent != kNone) link_newest(i);
  }
  pins_.erase(pin);
}

void RadixTree::hold(std::span<const PageId> pages) {
  pool_.retain(pages);
  for (const PageId page : pages) {
    if (tree_refs_[static_cast<size_t>(page)]++ == 0) ++num_tree_pages_;
  }
}

void RadixTree::drop(std::span<const PageId> pages) {
  for (const PageId page : pages) {
    if (--tree_refs_[static_cast<size_t>(page)] == 0) --num_tree_pages_;
  }
  pool_.release(pages);
}

void RadixTree::count_references(std::span<int64_t> counts) const {
  for (const Node& node : nodes_) {
    for (const PageId page : node.pages) ++counts[static_cast<size_t>(page)];
  }
}

}  // namespace skv
