#include "csrc/core/radix_tree.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#include "csrc/core/references.h"

namespace skv {

class RadixTreeTestPeer {
 public:
  using Node = RadixTree::Node;
  explicit RadixTreeTestPeer(RadixTree& tree) : tree_(tree) {}
  Node& deepest(std::span<const int32_t> tokens) { return tree_.at(tree_.walk(0, tokens).node); }
  std::vector<int64_t>& tree_refs() { return tree_.tree_refs_; }
  int64_t& num_nodes() { return tree_.num_nodes_; }
  int64_t& num_tree_pages() { return tree_.num_tree_pages_; }
  int32_t& oldest() { return tree_.oldest_; }
  int32_t& newest() { return tree_.newest_; }
  std::vector<int32_t>& unused() { return tree_.unused_; }
  void swap_list_ends() {
    const int32_t old = tree_.oldest_;
    tree_.unlink(old);
    tree_.link_newest(old);
  }

 private:
  RadixTree& tree_;
};

namespace {

using Tokens = std::vector<int32_t>;
using Pages = std::vector<PageId>;

Tokens counting(int32_t n, int32_t first = 0) {
  Tokens tokens(static_cast<size_t>(n));
  std::iota(tokens.begin(), tokens.end(), first);
  return tokens;
}

Tokens operator+(Tokens a, const Tokens& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

TokenSpan view(const Tokens& tokens) { return std::span<const int32_t>(tokens); }

class RadixTreeTest : public testing::Test {
 protected:
  // Inserts on fresh pages and lets go of them, as a sequence that ends would.
  Pages insert(const Tokens& tokens, RootKey key = 0) {
    const auto fresh = pool_.allocate((static_cast<int64_t>(tokens.size()) + 3) / 4);
    EXPECT_TRUE(fresh);
    const InsertResult result = tree_.insert(key, view(tokens), *fresh);
    EXPECT_EQ(result.pages, tree_.match(key, view(tokens)).pages);
    pool_.release(*fresh);
    expect_clean();
    return result.pages;
  }
  int64_t matched(const Tokens& tokens, RootKey key = 0) const {
    return tree_.match(key, view(tokens)).num_tokens;
  }
  void expect_clean() const {
    EXPECT_EQ(pool_.check_integrity(), std::nullopt);
    EXPECT_EQ(tree_.check_integrity(), std::nullopt);
  }
  void expect_all_owned() const {
    const RadixTree* trees[] = {&tree_};
    EXPECT_EQ(check_references(pool_, nullptr, trees), std::nullopt);
  }

  PagePool pool_{64, 4};
  RadixTree tree_{pool_};
};

TEST_F(RadixTreeTest, EmptyTreeMatchesNothing) {
  EXPECT_EQ(matched(counting(5)), 0);
  EXPECT_TRUE(tree_.match(0, view({})).pages.empty());
  EXPECT_EQ(tree_.insert(0, view({}), {}).num_matched, 0);
  EXPECT_EQ(tree_.num_nodes(), 0);
  EXPECT_EQ(tree_.evict_all(), 0);
  expect_clean();
}

TEST_F(RadixTreeTest, MatchIsTheLongestPrefixTokenByToken) {
  const Pages pages = insert(counting(10));
  EXPECT_EQ(pages.size(), 3u);
  for (int32_t n = 0; n <= 10; ++n) {
    const Match match = tree_.match(0, view(counting(n) + Tokens{99}));
    EXPECT_EQ(match.num_tokens, n);
    EXPECT_EQ(match.pages, Pages(pages.begin(), pages.begin() + (n + 3) / 4));
  }
  const std::vector<int64_t> wide{0, 1, 2, 3, 4, int64_t{1} << 32, 6};
  EXPECT_EQ(tree_.match(0, std::span<const int64_t>(wide)).num_tokens, 5);
  const std::vector<int64_t> wrapped{int64_t{1} << 32, 1};
  EXPECT_EQ(tree_.match(0, std::span<const int64_t>(wrapped)).num_tokens, 0);
}

TEST_F(RadixTreeTest, LongRunsAreComparedExactly) {
  PagePool pool(4, 1024);
  RadixTree tree(pool);
  const Tokens tokens = counting(1000);
  tree.insert(0, view(tokens), *pool.allocate(1));
  for (const size_t at : {0u, 1u, 63u, 64u, 65u, 127u, 128u, 500u, 998u, 999u}) {
    Tokens other = tokens;
    other[at] = 5000;
    const std::vector<int64_t> wide(other.begin(), other.end());
    EXPECT_EQ(tree.match(0, view(other)).num_tokens, static_cast<int64_t>(at));
    EXPECT_EQ(tree.match(0, std::span<const int64_t>(wide)).num_tokens, static_cast<int64_t>(at));
  }
}

TEST_F(RadixTreeTest, InsertIsIdempotentAndFoldsDuplicates) {
  const Pages pages = insert(counting(10));
  const int64_t num_free = pool_.num_free();
  EXPECT_EQ(insert(counting(10)), pages) << "the second set of pages is not kept";
  EXPECT_EQ(insert(counting(7)), Pages(pages.begin(), pages.begin() + 2));
  EXPECT_EQ(pool_.num_free(), num_free);
  EXPECT_EQ(tree_.num_nodes(), 1);
  expect_all_owned();
}

TEST_F(RadixTreeTest, DivergenceInsideAPage) {
  const Pages a = insert(counting(12));
  const Pages b = insert(counting(6) + Tokens{77, 78, 79});
  EXPECT_EQ(tree_.num_nodes(), 3);
  EXPECT_EQ(b[0], a[0]);
  EXPECT_NE(b[1], a[1]) << "the diverging page is the child's own full copy";
  EXPECT_EQ(tree_.match(0, view(counting(12))).pages, a);
  EXPECT_EQ(tree_.match(0, view(counting(6))).pages, Pages(a.begin(), a.begin() + 2));
  EXPECT_EQ(tree_.num_tree_pages(), 5);
  EXPECT_EQ(pool_.ref_count(a[1]), 2) << "both halves of the split hold it";
  expect_all_owned();
}

TEST_F(RadixTreeTest, AGrowingConversationKeepsNoDuplicatePages) {
  for (int32_t n = 3; n <= 30; n += 3) {
    insert(counting(n));
    EXPECT_EQ(tree_.num_tree_pages(), (n + 3) / 4);
  }
  EXPECT_EQ(tree_.num_nodes(), 10);
  EXPECT_EQ(pool_.num_free(), 64 - 8);
  EXPECT_EQ(matched(counting(30)), 30);
  EXPECT_EQ(tree_.evict_all(), 8);
  expect_all_owned();
}

TEST_F(RadixTreeTest, RootKeysShareNothing) {
  insert(counting(8), 1);
  EXPECT_EQ(matched(counting(8), 0), 0);
  EXPECT_EQ(matched(counting(8), 2), 0);
  const Pages other = insert(counting(8), ~RootKey{0});
  EXPECT_EQ(tree_.num_tree_pages(), 4);
  EXPECT_EQ(tree_.evict(2), 2);
  EXPECT_EQ(matched(counting(8), 1), 0);
  EXPECT_EQ(tree_.match(~RootKey{0}, view(counting(8))).pages, other);
}

TEST_F(RadixTreeTest, EvictsLeastRecentlyUsedFromTheTail) {
  insert(counting(8));
  insert(counting(8, 100));
  tree_.touch(tree_.match(0, view(counting(8))));
  EXPECT_EQ(tree_.evict(1), 1);
  EXPECT_EQ(matched(counting(8, 100)), 4) << "only the tail of the older one went";
  EXPECT_EQ(matched(counting(8)), 8);
  expect_clean();
  EXPECT_EQ(tree_.evict(2), 2);
  EXPECT_EQ(matched(counting(8, 100)), 0);
  EXPECT_EQ(matched(counting(8)), 4);
  EXPECT_EQ(tree_.evict(5), 1) << "says how many it could";
  EXPECT_EQ(pool_.num_free(), 64);
  EXPECT_EQ(tree_.num_nodes(), 0);
  EXPECT_THROW(tree_.evict(-1), std::invalid_argument);
  expect_clean();
}

TEST_F(RadixTreeTest, NeverEvictsWhatIsHeldOutside) {
  const Pages shared = insert(counting(8));
  const Pages longer = insert(counting(16));
  pool_.retain(shared);
  EXPECT_EQ(tree_.num_evictable_pages(), 2);
  EXPECT_EQ(tree_.evict_all(), 2);
  EXPECT_EQ(matched(counting(16)), 8);
  pool_.release(shared);
  EXPECT_EQ(tree_.num_evictable_pages(), 2);
  EXPECT_EQ(tree_.evict_all(), 2);
  EXPECT_EQ(pool_.num_free(), 64);
  expect_clean();
}

// Both texts share token 0 alone, so the page of the older one stays with the upper half of the
// split as long as the other text is held.
TEST_F(RadixTreeTest, CountsWhatHeldPagesBlock) {
  const Pages older = insert(counting(8));
  const Pages newer = insert(counting(1) + counting(7, 50));
  EXPECT_EQ(tree_.num_blocked_pages({}), 0);
  EXPECT_EQ(tree_.num_blocked_pages(older), 0);
  EXPECT_EQ(tree_.num_blocked_pages(newer), 1);
  EXPECT_EQ(tree_.num_blocked_pages(newer + newer), 1);
  EXPECT_EQ(tree_.num_blocked_pages(older + newer), 0);
  EXPECT_THROW(tree_.num_blocked_pages(Pages{64}), std::out_of_range);
  EXPECT_THROW(tree_.num_blocked_pages(Pages{-1}), std::out_of_range);
  pool_.retain(older);
  pool_.retain(newer);
  EXPECT_EQ(tree_.num_blocked_pages(newer), 1) << "as if the others were released";
  pool_.release(older);
  EXPECT_EQ(tree_.evict_all(), 1);
  EXPECT_EQ(tree_.num_blocked_pages(newer), 1);
  pool_.release(newer);
  tree_.evict_all();
  expect_all_owned();
}

TEST_F(RadixTreeTest, PinProtectsExactlyThePrefix) {
  insert(counting(16));
  const PinId pin = tree_.pin(0, view(counting(6)));
  EXPECT_EQ(tree_.pinned_length(pin), 6);
  EXPECT_EQ(tree_.num_pinned_pages(), 2);
  EXPECT_EQ(tree_.num_evictable_pages(), 2);
  expect_clean();
  insert(counting(3) + counting(5, 50));
  const PinId inner = tree_.pin(0, view(counting(2)));
  expect_clean();
  tree_.evict_all();
  EXPECT_EQ(matched(counting(16)), 6);
  tree_.unpin(pin);
  expect_clean();
  tree_.evict_all();
  EXPECT_EQ(matched(counting(16)), 2);
  tree_.unpin(inner);
  EXPECT_EQ(tree_.evict_all(), 1);
  EXPECT_EQ(pool_.num_free(), 64);
  EXPECT_THROW(tree_.unpin(pin), std::invalid_argument);
  EXPECT_THROW(tree_.pinned_length(pin), std::invalid_argument);
  EXPECT_THROW(tree_.unpin(17), std::out_of_range);
  const PinId empty = tree_.pin(0, view(counting(2)));
  EXPECT_EQ(tree_.pinned_length(empty), 0);
  tree_.unpin(empty);
  expect_clean();
}

TEST_F(RadixTreeTest, StaleHandlesAreIgnored) {
  insert(counting(8));
  const Match stale = tree_.match(0, view(counting(8)));
  tree_.evict_all();
  tree_.touch(stale);
  insert(counting(8, 50));
  tree_.touch(stale);
  tree_.touch(NodeHandle{stale.node.tree});
  tree_.touch(NodeHandle{stale.node.tree, 1000, 0});
  expect_clean();
}

TEST_F(RadixTreeTest, HandlesOfAnotherTreeAreRefused) {
  insert(counting(8));
  NodeHandle old;
  for (int i = 0; i < 20; ++i) {
    // Often at the address of the tree before.
    const auto tree = std::make_unique<RadixTree>(pool_);
    EXPECT_THROW(tree->touch(old), std::invalid_argument) << "of the tree before";
    EXPECT_THROW(tree->touch(tree_.match(0, view(counting(8)))), std::invalid_argument);
    EXPECT_THROW(tree_.touch(tree->match(0, view(counting(8)))), std::invalid_argument)
        << "also a match of nothing belongs to its tree";
    old = tree->match(0, {}).node;
    tree->touch(old);
  }
  EXPECT_THROW(tree_.touch(NodeHandle{}), std::invalid_argument);
  expect_clean();
}

TEST_F(RadixTreeTest, BadInsertsChangeNothing) {
  const Pages pages = insert(counting(8));
  const Tokens longer = counting(16);
  const auto expect_unchanged = [&] {
    EXPECT_EQ(matched(longer), 8);
    EXPECT_EQ(pool_.num_free(), 62);
    expect_clean();
  };
  const auto insert_longer = [&](const Pages& with) { tree_.insert(0, view(longer), with); };
  EXPECT_THROW(insert_longer(pages), std::invalid_argument) << "too few pages";
  EXPECT_THROW(insert_longer({pages[0], pages[1], 40, 41}), std::invalid_argument) << "free";
  EXPECT_THROW(insert_longer({pages[0], pages[1], 64, 65}), std::out_of_range);
  EXPECT_THROW(insert_longer({pages[0], pages[1], pages[0], pages[1]}), std::invalid_argument);
  EXPECT_THROW(tree_.insert(0, view({1, -1}), Pages{pages[0]}), std::invalid_argument);
  const std::vector<int64_t> wide{1, int64_t{1} << 31};
  EXPECT_THROW(tree_.insert(0, std::span<const int64_t>(wide), Pages{pages[0]}),
               std::invalid_argument);
  expect_unchanged();
}

TEST_F(RadixTreeTest, DeepAndWideTreesNeedNoStack) {
  PagePool pool(100001, 1);
  RadixTree tree(pool);
  const Tokens path = counting(30000);
  const Pages pages = *pool.allocate(30000);
  for (size_t n = 1; n <= path.size(); n += 1 + n / 64) {
    tree.insert(0, std::span<const int32_t>(path).first(n), std::span(pages).first(n));
  }
  tree.insert(0, view(path), pages);
  for (int32_t sibling = 0; sibling < 50000; ++sibling) {
    const Pages page = *pool.allocate(1);
    tree.insert(0, view({sibling + 100000}), page);
    pool.release(page);
  }
  pool.release(pages);
  EXPECT_EQ(tree.check_integrity(), std::nullopt);
  EXPECT_EQ(tree.evict_all(), 80000);
  EXPECT_EQ(tree.num_nodes(), 0);
}

TEST_F(RadixTreeTest, OneTokenSplitsEverywhere) {
  const Tokens path = counting(40);
  insert(path);
  for (int32_t at = 39; at > 0; --at) insert(counting(at) + Tokens{1000 + at});
  EXPECT_EQ(tree_.num_nodes(), 79);
  EXPECT_EQ(matched(path), 40);
  tree_.evict_all();
  EXPECT_EQ(pool_.num_free(), 64);
}

TEST_F(RadixTreeTest, RandomOperationsAgainstAListOfPaths) {
  std::mt19937 random(11);
  std::vector<Tokens> inserted;
  std::map<PinId, Tokens> pins;
  const auto random_tokens = [&] {
    Tokens tokens =
        inserted.empty() || random() % 3 == 0 ? Tokens{} : inserted[random() % inserted.size()];
    tokens.resize(random() % (tokens.size() + 1));
    for (size_t n = random() % 7; n > 0; --n) tokens.push_back(static_cast<int32_t>(random() % 3));
    return tokens;
  };
  for (int step = 0; step < 6000; ++step) {
    const Tokens tokens = random_tokens();
    const int64_t num_pages = (static_cast<int64_t>(tokens.size()) + 3) / 4;
    switch (random() % 8) {
      case 0:
        pins.emplace(tree_.pin(0, view(tokens)), tokens);
        break;
      case 1:
        if (pins.empty()) break;
        tree_.unpin(pins.begin()->first);
        pins.erase(pins.begin());
        break;
      case 2: {
        const int64_t evictable = tree_.num_evictable_pages();
        const int64_t wanted = random() % 4 == 0 ? 64 : random() % 6;
        ASSERT_EQ(tree_.evict(wanted), std::min(wanted, evictable));
        inserted.clear();
        break;
      }
      default:
        if (tokens.size() > 40 || num_pages > pool_.num_free()) break;
        const Pages fresh = *pool_.allocate(num_pages);
        const int64_t before = matched(tokens);
        const InsertResult result = tree_.insert(0, view(tokens), fresh);
        pool_.release(fresh);
        ASSERT_EQ(result.num_matched, before);
        ASSERT_EQ(result.pages, tree_.match(0, view(tokens)).pages);
        inserted.push_back(tokens);
    }
    for (const Tokens& path : inserted) ASSERT_EQ(matched(path), std::ssize(path));
    for (const auto& [pin, path] : pins) ASSERT_GE(matched(path), tree_.pinned_length(pin));
    ASSERT_EQ(tree_.check_integrity(), std::nullopt) << step;
    const RadixTree* trees[] = {&tree_};
    ASSERT_EQ(check_references(pool_, nullptr, trees), std::nullopt);
  }
  for (const auto& [pin, path] : pins) tree_.unpin(pin);
  EXPECT_EQ(tree_.num_evictable_pages(), tree_.num_tree_pages());
  tree_.evict_all();
  EXPECT_EQ(pool_.num_free(), 64);
}

TEST_F(RadixTreeTest, FindsPlantedBugs) {
  insert(counting(12));
  insert(counting(6) + Tokens{77, 78, 79});
  const PinId pin = tree_.pin(0, view(counting(6)));
  RadixTreeTestPeer peer(tree_);
  auto& upper = peer.deepest(counting(6));
  auto& lower = peer.deepest(counting(12));
  const auto expect_problem = [&](const char* part) {
    const auto problem = tree_.check_integrity();
    ASSERT_TRUE(problem) << part;
    EXPECT_NE(problem->find(part), std::string::npos) << *problem;
  };
  // Plants `value`, looks, and puts the old value back.
  const auto plant = [&](auto& field, auto value, const char* part) {
    const auto old = field;
    field = value;
    expect_problem(part);
    field = old;
    ASSERT_EQ(tree_.check_integrity(), std::nullopt) << part;
  };
  plant(lower.start, int64_t{7}, "token range");
  plant(lower.end, int64_t{6}, "token range");
  plant(lower.end, int64_t{14}, "outside its text");
  plant(lower.end, int64_t{8}, "number of pages");
  plant(lower.text_begin, int64_t{5}, "first token");
  plant(lower.text, std::make_shared<const std::vector<TokenId>>(Tokens(12, -4)), "no token");
  plant(lower.parent, 0, "");
  plant(lower.pages[1], lower.pages[0], "two page indices");
  plant(lower.pages[1], 64, "not in the pool");
  plant(lower.pages[1], 60, "tree_refs");
  plant(upper.children, decltype(upper.children){}, "does not know it");
  plant(upper.num_pins, int64_t{2}, "num_pins");
  plant(lower.num_pins, int64_t{1}, "num_pins");
  plant(lower.is_listed, false, "list of use");
  plant(lower.is_live, false, "unused");
  plant(peer.tree_refs()[0], int64_t{3}, "tree_refs");
  plant(peer.num_nodes(), int64_t{4}, "num_nodes");
  plant(peer.num_tree_pages(), int64_t{4}, "num_tree_pages");
  plant(peer.unused(), std::vector<int32_t>{0}, "unused list");
  plant(peer.newest(), peer.oldest(), "newest");
  plant(lower.newer, peer.oldest(), "list of use");
  tree_.unpin(pin);
  ASSERT_EQ(tree_.check_integrity(), std::nullopt);
  insert(counting(4, 500));
  insert(counting(8, 500));
  tree_.touch(tree_.match(0, view(counting(12))));
  for (int i = 0; i < 2; ++i) peer.swap_list_ends();
  expect_problem("more recent than its parent");
}

}  // namespace
}  // namespace skv
