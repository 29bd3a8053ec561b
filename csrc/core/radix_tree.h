// Which token prefixes have KV in the pool, and on which pages: a compressed radix tree.
//
// One tree per root key (a tenant's salt; 0 by default); nothing is ever shared across keys. A node
// holds the tokens [start, end) of its path, in absolute positions, and the pages that cover them:
// page indices [start / B, ceil(end / B)). Borders are token granular, so a page may lie in several
// nodes:
//
//   position   0         8         16   B = 8
//   root ──── [0 ........ 12) ─┬─ [12 ..... 20)   page index 1: a full copy of 8..11 is in the
//              p0      p1      │   p2      p3     child's own page p2
//                              └─ [12 . 16)       a sibling with a page of its own
//                                  p4
//
//   Page of index i of a path = page of the deepest node on it that covers a matched token of i.
//   A split inside a page leaves that page to both halves; each holds a reference.
//   A new child that carries a full copy of its parent's last, partly filled page takes over for
//   the whole path when nobody else in the tree uses the old page; so a growing conversation keeps
//   one page per page_size tokens, not one more per turn.
//
// match() is a question and changes nothing. insert() and touch() make a path the most recently
// used one. A pin protects a path from eviction until unpin(); it survives splits. evict() takes
// pages from the end of least recently used leaves and never a page that is held outside the tree
// (the page's reference count in the pool exceeds the tree's own). Eviction follows one list in
// which a parent is always more recent than its children, so one walk sees leaves before what
// they hang on.
//
// Cost: match and insert O(tokens + nodes on the path), evict O(list entries passed + pages taken),
// no recursion. The pool must outlive the tree. Not thread safe: the engine thread owns the tree.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "csrc/core/ids.h"
#include "csrc/core/page_marks.h"
#include "csrc/core/page_pool.h"
#include "csrc/core/token_span.h"

namespace skv {

using RootKey = uint64_t;
using PinId = int64_t;  // never reused within the life of a tree

// Names a node as long as it lives. Holds no pointer: a handle may outlive its node and its tree.
struct NodeHandle {
  uint64_t tree = 0;   // the serial number of the tree, unlike its address never used again
  int32_t index = -1;  // -1 for a match of nothing
  uint32_t generation = 0;
};

struct Match {
  int64_t num_tokens = 0;
  std::vector<PageId> pages;  // ceil(num_tokens / page_size); the tree's, not retained for you
  NodeHandle node;            // deepest node used, for touch()
};

struct InsertResult {
  int64_t num_matched = 0;    // tokens that were there before
  std::vector<PageId> pages;  // canonical pages of the whole path
};

class RadixTree {
 public:
  explicit RadixTree(PagePool& pool);
  ~RadixTree();  // releases every page; pins do not outlive the tree
  RadixTree(const RadixTree&) = delete;
  RadixTree& operator=(const RadixTree&) = delete;

  // Longest cached prefix of `tokens`. Any integers are legal: what is no token id never matches.
  Match match(RootKey root_key, TokenSpan tokens) const;

  // Marks the path of a match as just used. A node that is gone since then is no error; a match of
  // another tree is one (std::invalid_argument), also if that tree is gone.
  void touch(const Match& match) { touch(match.node); }
  void touch(NodeHandle node);

  // Makes `tokens` matchable. `pages` are ceil(size / page_size) distinct held pages with the KV of
  // all the tokens, written completely. Only pages of new tokens are retained. Idempotent.
  // std::invalid_argument / std::out_of_range on bad tokens or pages, and nothing changed.
  InsertResult insert(RootKey root_key, TokenSpan tokens, std::span<const PageId> pages);

  // Protects the longest cached prefix of `tokens`, exactly that. Pins nest.
  PinId pin(RootKey root_key, TokenSpan tokens);
  // Tokens a pin protects. Unknown pin: std::out_of_range; released: std::invalid_argument.
  int64_t pinned_length(PinId pin) const;
  void unpin(PinId pin);

  // Drops cached pages until num_pages more pages are free, or no more can be. Returns the number
  // that became free.
  int64_t evict(int64_t num_pages);
  int64_t evict_all();

  // Pages that evict_all() would free now. O(tree pages + pool pages).
  int64_t num_evictable_pages() const;
  // Pages that evict_all() would leave to the tree alone if of all holders outside only those of
  // `kept` remained: they cover tokens before a kept page or a pin. O(tree pages + pool pages).
  // std::out_of_range on an unknown page.
  int64_t num_blocked_pages(std::span<const PageId> kept) const;
  // Distinct pages of pinned nodes. O(tree pages + pool pages).
  int64_t num_pinned_pages() const;
  // Distinct pages held by the tree. O(1).
  int64_t num_tree_pages() const { return num_tree_pages_; }
  // Nodes that hold tokens. O(1).
  int64_t num_nodes() const { return num_nodes_; }

  // Describes the first violation found. O(tree tokens + pool pages).
  std::optional<std::string> check_integrity() const;

  // Adds one to counts[page] for every node that holds it; counts has num_pages entries.
  void count_references(std::span<int64_t> counts) const;

 private:
  friend class RadixTreeTestPeer;

  using NodeIndex = int32_t;
  static constexpr NodeIndex kNone = -1;

  struct Node {
    // The tokens are text[text_begin, text_begin + end - start): halves of a split share the text,
    // so a split copies no tokens.
    std::shared_ptr<const std::vector<TokenId>> text;
    int64_t text_begin = 0;
    int64_t start = 0;
    int64_t end = 0;
    std::vector<PageId> pages;
    std::unordered_map<TokenId, NodeIndex> children;  // by their first token
    RootKey root_key = 0;                             // of a root only
    int64_t num_pins = 0;                             // pins in the subtree
    uint32_t generation = 0;
    NodeIndex parent = kNone;  // kNone for a root
    NodeIndex older = kNone;
    NodeIndex newer = kNone;
    bool is_live = false;
    bool is_listed = false;  // in the list of use: live, no root, not pinned
  };

  struct Walk {
    NodeIndex node = kNone;  // deepest node with a matched token; the root (or kNone) if none
    int64_t num_tokens = 0;
    std::vector<PageId> pages;
  };

  struct Pin {
    NodeIndex node;  // kNone if nothing was matched
    int64_t length;
  };

  Node& at(NodeIndex i) { return nodes_[static_cast<size_t>(i)]; }
  const Node& at(NodeIndex i) const { return nodes_[static_cast<size_t>(i)]; }
  static const TokenId* tokens_of(const Node& node) { return node.text->data() + node.text_begin; }
  int64_t first_page(const Node& node) const { return node.start / pool_.page_size(); }

  Walk walk(RootKey root_key, TokenSpan tokens) const;
  const Pin& find_pin(PinId pin) const;
  void require_insertable(TokenSpan tokens, std::span<const PageId> pages);

  NodeIndex new_node();
  NodeIndex root_of(RootKey root_key);
  NodeIndex split(NodeIndex lower, int64_t position);
  void add_leaf(NodeIndex parent, TokenSpan tokens, std::span<const PageId> pages);
  void fold_partial_page(NodeIndex leaf);
  void trim_leaf(NodeIndex leaf, int64_t free_target);
  void remove_leaf(NodeIndex leaf);
  void recycle(NodeIndex index);
  void compact_text(Node& node);

  void hold(std::span<const PageId> pages);
  void drop(std::span<const PageId> pages);
  int64_t count_evictable(const std::vector<bool>& is_held) const;
  bool is_held_outside(PageId page) const {
    return pool_.ref_count(page) != tree_refs_[static_cast<size_t>(page)];
  }

  void touch_path(NodeIndex node);
  void link_newest(NodeIndex node);
  void link_newer_than(NodeIndex node, NodeIndex older);
  void unlink(NodeIndex node);

  // Parts of check_integrity(), in radix_tree_check.cpp.
  std::optional<std::string> check_node(NodeIndex index) const;
  std::optional<std::string> check_links() const;
  std::optional<std::string> check_pages() const;
  std::optional<std::string> check_pins() const;
  std::optional<std::string> check_list() const;

  PagePool& pool_;
  const uint64_t serial_;   // of all trees of this process; from 1
  std::deque<Node> nodes_;  // a deque, so that references survive new nodes
  std::vector<NodeIndex> unused_;
  std::unordered_map<RootKey, NodeIndex> roots_;  // only roots that have children
  std::unordered_map<PinId, Pin> pins_;
  PinId next_pin_ = 0;
  NodeIndex oldest_ = kNone;
  NodeIndex newest_ = kNone;
  std::vector<int64_t> tree_refs_;  // [num_pages], nodes that hold the page
  int64_t num_tree_pages_ = 0;
  int64_t num_nodes_ = 0;
  PageMarks marks_;
};

}  // namespace skv
