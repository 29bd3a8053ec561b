// Integrity of the RadixTree: everything is recomputed from the nodes, nothing that the working
// code maintains is trusted.
#include <string>
#include <utility>

#include "csrc/core/checked_math.h"
#include "csrc/core/radix_tree.h"

namespace skv {

std::optional<std::string> RadixTree::check_integrity() const {
  int64_t num_live = 0;
  for (size_t i = 0; i < nodes_.size(); ++i) {
    if (auto problem = check_node(static_cast<NodeIndex>(i))) {
      return "RadixTree: node " + std::to_string(i) + ": " + *problem;
    }
    if (nodes_[i].is_live && nodes_[i].parent != kNone) ++num_live;
  }
  if (num_live != num_nodes_) return "RadixTree: num_nodes differs from the nodes there are";
  for (auto check : {&RadixTree::check_links, &RadixTree::check_pages, &RadixTree::check_pins,
                     &RadixTree::check_list}) {
    if (auto problem = (this->*check)()) return "RadixTree: " + *problem;
  }
  return std::nullopt;
}

// One node against its parent: ranges, tokens, page count.
std::optional<std::string> RadixTree::check_node(NodeIndex index) const {
  const Node& node = at(index);
  if (!node.is_live) {
    if (!node.pages.empty() || !node.children.empty()) return "unused, but holds something";
    return std::nullopt;
  }
  if (node.parent == kNone) {
    const auto root = roots_.find(node.root_key);
    if (root == roots_.end() || root->second != index) return "has no parent and is no root";
    if (node.start != 0 || node.end != 0 || !node.pages.empty()) return "a root holds tokens";
    return node.children.empty() ? std::optional<std::string>("a root without children")
                                 : std::nullopt;
  }
  if (!at(node.parent).is_live) return "its parent is unused";
  // Starts grow along every path, so this also rules out cycles.
  if (node.start != at(node.parent).end || node.end <= node.start) return "a wrong token range";
  if (node.text == nullptr || node.text_begin < 0 ||
      node.text_begin + node.end - node.start > static_cast<int64_t>(node.text->size())) {
    return "its tokens lie outside its text";
  }
  for (int64_t i = 0; i < node.end - node.start; ++i) {
    if (tokens_of(node)[i] < 0) return "holds a value that is no token";
  }
  const auto entry = at(node.parent).children.find(*tokens_of(node));
  if (entry == at(node.parent).children.end() || entry->second != index) {
    return "its parent does not know it by its first token";
  }
  const int64_t num_pages = ceil_div(node.end, pool_.page_size()) - first_page(node);
  if (static_cast<int64_t>(node.pages.size()) != num_pages) return "a wrong number of pages";
  return std::nullopt;
}

// Children and roots point at live nodes that point back; unused nodes are listed once.
std::optional<std::string> RadixTree::check_links() const {
  for (size_t i = 0; i < nodes_.size(); ++i) {
    for (const auto& [token, child] : nodes_[i].children) {
      if (child < 0 || static_cast<size_t>(child) >= nodes_.size() || !at(child).is_live ||
          at(child).parent != static_cast<NodeIndex>(i)) {
        return "a child of node " + std::to_string(i) + " does not point back";
      }
    }
  }
  for (const auto& [key, root] : roots_) {
    if (!at(root).is_live || at(root).parent != kNone || at(root).root_key != key) {
      return "root key " + std::to_string(key) + " points at another node";
    }
  }
  std::vector<bool> is_unused(nodes_.size(), false);
  for (const NodeIndex i : unused_) {
    if (at(i).is_live || is_unused[static_cast<size_t>(i)]) return "the unused list is wrong";
    is_unused[static_cast<size_t>(i)] = true;
  }
  for (size_t i = 0; i < nodes_.size(); ++i) {
    if (!nodes_[i].is_live && !is_unused[i]) return "node " + std::to_string(i) + " is lost";
  }
  return std::nullopt;
}

// A page lies at one page index, its holders are one chain of parents, and the counts fit.
std::optional<std::string> RadixTree::check_pages() const {
  std::vector<int64_t> refs(tree_refs_.size(), 0);
  std::vector<int64_t> page_index(tree_refs_.size(), -1);
  std::vector<bool> has_top(tree_refs_.size(), false);
  int64_t num_held = 0;
  for (const Node& node : nodes_) {
    for (size_t i = 0; i < node.pages.size(); ++i) {
      const PageId page_id = node.pages[i];
      if (page_id < 0 || page_id >= pool_.num_pages()) return "a page that is not in the pool";
      const auto page = static_cast<size_t>(page_id);
      const std::string name = "page " + std::to_string(page_id);
      const int64_t index = first_page(node) + static_cast<int64_t>(i);
      if (refs[page]++ == 0) {
        ++num_held;
        page_index[page] = index;
      }
      if (page_index[page] != index) return name + " stands at two page indices";
      const std::vector<PageId>& above = at(node.parent).pages;
      const bool is_top = i != 0 || above.empty() || above.back() != page_id;
      if (is_top && has_top[page]) return name + " is held by two unrelated nodes";
      if (is_top) has_top[page] = true;
    }
  }
  for (size_t page = 0; page < refs.size(); ++page) {
    const std::string name = "page " + std::to_string(page);
    if (refs[page] != tree_refs_[page]) return name + ": counted holders differ from tree_refs";
    if (pool_.ref_count(static_cast<PageId>(page)) < refs[page]) {
      return name + " has fewer references in the pool than holders in the tree";
    }
  }
  if (num_held != num_tree_pages_) return "num_tree_pages differs from the pages there are";
  return std::nullopt;
}

std::optional<std::string> RadixTree::check_pins() const {
  std::vector<int64_t> num_pins(nodes_.size(), 0);
  for (const auto& [id, pin] : pins_) {
    const std::string name = "pin " + std::to_string(id);
    if (pin.node == kNone && pin.length == 0) continue;
    if (pin.node < 0 || static_cast<size_t>(pin.node) >= nodes_.size() || !at(pin.node).is_live) {
      return name + " points at an unused node";
    }
    if (at(pin.node).end != pin.length) return name + " no longer ends at a node border";
    for (NodeIndex i = pin.node; i != kNone; i = at(i).parent) ++num_pins[static_cast<size_t>(i)];
  }
  for (size_t i = 0; i < nodes_.size(); ++i) {
    if (nodes_[i].num_pins != num_pins[i]) {
      return "node " + std::to_string(i) + ": num_pins differs from the pins below it";
    }
  }
  return std::nullopt;
}

// The list of use holds exactly the unpinned nodes, once each, parents after their children.
std::optional<std::string> RadixTree::check_list() const {
  std::vector<size_t> order(nodes_.size(), 0);  // 0 = not in the list
  size_t position = 0;
  NodeIndex last = kNone;
  for (NodeIndex i = oldest_; i != kNone; last = i, i = at(i).newer) {
    const std::string name = "list of use: node " + std::to_string(i);
    if (at(i).older != last) return name + " does not point back";
    if (order[static_cast<size_t>(i)] != 0) return name + " is in it twice";
    order[static_cast<size_t>(i)] = ++position;
  }
  if (last != newest_) return "list of use: does not end at the newest node";
  for (size_t i = 0; i < nodes_.size(); ++i) {
    const Node& node = nodes_[i];
    const std::string name = "list of use: node " + std::to_string(i);
    const bool belongs = node.is_live && node.parent != kNone && node.num_pins == 0;
    if (belongs != (order[i] != 0) || belongs != node.is_listed) {
      return name + (belongs ? " is missing" : " does not belong in it");
    }
    if (belongs && at(node.parent).is_listed &&
        order[static_cast<size_t>(node.parent)] < order[i]) {
      return name + " is more recent than its parent";
    }
  }
  return std::nullopt;
}

}  // namespace skv
