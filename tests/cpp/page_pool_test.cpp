#include "csrc/core/page_pool.h"

#include <gtest/gtest.h>

#include <random>
#include <stdexcept>
#include <vector>

namespace skv {

class PagePoolTestPeer {
 public:
  static std::vector<uint32_t>& ref_counts(PagePool& pool) { return pool.ref_counts_; }
  static std::vector<PageId>& free_list(PagePool& pool) { return pool.free_; }
};

namespace {

using Pages = std::vector<PageId>;

TEST(PagePool, AllocatesAllOrNothing) {
  PagePool pool(4, 16);
  const auto first = pool.allocate(3);
  ASSERT_TRUE(first);
  EXPECT_EQ(*first, (Pages{0, 1, 2}));
  EXPECT_FALSE(pool.allocate(2));
  EXPECT_EQ(pool.num_free(), 1);
  EXPECT_EQ(pool.allocate(0), Pages{});
  EXPECT_EQ(pool.allocate(1), Pages{3});
  EXPECT_FALSE(pool.check_integrity());
}

TEST(PagePool, LastReleaseFrees) {
  PagePool pool(3, 16);
  const Pages pages = *pool.allocate(2);
  pool.retain(pages);
  pool.release(pages);
  EXPECT_EQ(pool.num_free(), 1);
  EXPECT_EQ(pool.ref_count(pages[0]), 1);
  pool.release(pages);
  EXPECT_EQ(pool.num_free(), 3);
  EXPECT_EQ(pool.ref_count(pages[0]), 0);
  EXPECT_EQ(pool.allocate(2), pages) << "freed pages come back in their old order";
  EXPECT_FALSE(pool.check_integrity());
}

TEST(PagePool, BadCallsChangeNothing) {
  PagePool pool(4, 16);
  const Pages pages = *pool.allocate(3);
  pool.retain(Pages{pages[1]});
  const auto expect_unchanged = [&] {
    EXPECT_EQ(pool.num_free(), 1);
    EXPECT_EQ(pool.ref_count(pages[0]), 1);
    EXPECT_EQ(pool.ref_count(pages[1]), 2);
    EXPECT_EQ(pool.ref_count(pages[2]), 1);
    EXPECT_FALSE(pool.check_integrity());
  };
  EXPECT_THROW(pool.release(Pages{2, 1, 0, 3}), std::invalid_argument);
  expect_unchanged();
  EXPECT_THROW(pool.release(Pages{3, 1, 0}), std::invalid_argument);
  expect_unchanged();
  EXPECT_THROW(pool.release(Pages{0, 1, 0}), std::invalid_argument) << "twice in one call";
  expect_unchanged();
  EXPECT_THROW(pool.release(Pages{0, 4}), std::out_of_range);
  EXPECT_THROW(pool.release(Pages{-1, 0}), std::out_of_range);
  expect_unchanged();
  EXPECT_THROW(pool.retain(Pages{0, 3}), std::invalid_argument);
  EXPECT_THROW(pool.retain(Pages{0, 4}), std::out_of_range);
  expect_unchanged();
  EXPECT_THROW(pool.allocate(-1), std::invalid_argument);
  EXPECT_THROW(pool.ref_count(-1), std::out_of_range);
  expect_unchanged();
}

TEST(PagePool, RefusesImpossibleSizes) {
  EXPECT_THROW(PagePool(-1, 16), std::invalid_argument);
  EXPECT_THROW(PagePool(int64_t{1} << 31, 16), std::invalid_argument);
  EXPECT_THROW(PagePool(4, 0), std::invalid_argument);
  EXPECT_THROW(PagePool(4, int64_t{1} << 31), std::invalid_argument);
  EXPECT_EQ(PagePool(4, (int64_t{1} << 31) - 1).num_free(), 4);
  EXPECT_EQ(PagePool(0, 1).num_free(), 0);
}

TEST(PagePool, RandomOperationsKeepCounts) {
  std::mt19937 random(7);
  PagePool pool(12, 4);
  std::vector<int64_t> model(12, 0);
  for (int step = 0; step < 4000; ++step) {
    Pages pages(random() % 4);
    for (PageId& page : pages) page = static_cast<PageId>(random() % 13) - (random() % 20 == 0);
    std::vector<int64_t> wanted = model;
    const int delta = random() % 2 == 0 ? 1 : -1;
    bool is_legal = true;
    for (const PageId page : pages) {
      const bool is_held = page >= 0 && page < 12 && wanted[static_cast<size_t>(page)] > 0;
      is_legal = is_legal && is_held;
      if (is_held) wanted[static_cast<size_t>(page)] += delta;
    }
    const auto call = [&] { delta == 1 ? pool.retain(pages) : pool.release(pages); };
    if (is_legal) {
      call();
      model = wanted;
    } else {
      EXPECT_THROW(call(), std::logic_error);
    }
    if (random() % 2 == 0) {
      if (const auto fresh = pool.allocate(1)) model[static_cast<size_t>(fresh->front())] = 1;
    }
    int64_t num_free = 0;
    for (PageId page = 0; page < 12; ++page) {
      ASSERT_EQ(pool.ref_count(page), model[static_cast<size_t>(page)]);
      num_free += model[static_cast<size_t>(page)] == 0;
    }
    ASSERT_EQ(pool.num_free(), num_free);
    ASSERT_FALSE(pool.check_integrity());
  }
}

// Each detector of check_integrity() must find the bug it is there for.
class PagePoolPlanted : public testing::Test {
 protected:
  PagePoolPlanted() { pool_.allocate(2); }
  ~PagePoolPlanted() override {
    const auto problem = pool_.check_integrity();
    EXPECT_TRUE(problem);
    EXPECT_NE(problem.value_or("").find(expected_), std::string::npos) << problem.value_or("");
  }
  PagePool pool_{4, 16};
  std::string expected_;
};

TEST_F(PagePoolPlanted, LostPage) {
  PagePoolTestPeer::ref_counts(pool_)[1] = 0;
  expected_ = "page 1 is lost";
}
TEST_F(PagePoolPlanted, FreePageWithReferences) {
  PagePoolTestPeer::ref_counts(pool_)[3] = 1;
  expected_ = "page 3 is free but has references";
}
TEST_F(PagePoolPlanted, TwiceFree) {
  PagePoolTestPeer::free_list(pool_).push_back(3);
  expected_ = "page 3 is twice";
}
TEST_F(PagePoolPlanted, UnknownPage) {
  PagePoolTestPeer::free_list(pool_).push_back(9);
  expected_ = "page 9";
}
TEST_F(PagePoolPlanted, ImpossibleCount) {
  PagePoolTestPeer::ref_counts(pool_)[0] = ~0U;
  expected_ = "impossible";
}

}  // namespace
}  // namespace skv
