#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <random>
#include <stdexcept>
#include <vector>

#include "csrc/core/references.h"
#include "csrc/core/sequence_table.h"

namespace skv {
namespace {

using Pages = std::vector<PageId>;
using Ids = std::vector<SequenceId>;
using Counts = std::vector<int64_t>;

Pages pages_of(const SequenceTable& table, SequenceId seq) {
  const auto view = table.page_table(seq);
  return {view.begin(), view.end()};
}

class SequenceTableBatchTest : public testing::Test {
 protected:
  SequenceId make(int64_t num_tokens) {
    const SequenceId seq = table_.create();
    EXPECT_TRUE(table_.reserve(seq, num_tokens));
    table_.commit(seq, num_tokens);
    return seq;
  }
  void expect_clean() const {
    EXPECT_EQ(pool_.check_integrity(), std::nullopt);
    EXPECT_EQ(table_.check_integrity(), std::nullopt);
    EXPECT_EQ(check_references(pool_, &table_, {}), std::nullopt);
  }

  PagePool pool_{8, 4};
  SequenceTable table_{pool_};
};

TEST_F(SequenceTableBatchTest, AppendsAndCommits) {
  const SequenceId a = make(3);
  const SequenceId b = table_.create();
  const auto copies = table_.reserve_batch(Ids{a, b}, Counts{2, 5});
  ASSERT_TRUE(copies);
  EXPECT_TRUE(copies->empty());
  EXPECT_EQ(table_.num_reserved(a), 2);
  EXPECT_EQ(table_.num_reserved(b), 5);
  table_.commit_batch(Ids{b, a}, Counts{1, 2});
  EXPECT_EQ(table_.length(a), 5);
  EXPECT_EQ(table_.length(b), 1);
  EXPECT_EQ(pool_.num_free(), 5);
  EXPECT_TRUE(table_.reserve_batch(Ids{}, Counts{})->empty());
  table_.commit_batch(Ids{}, Counts{});
  expect_clean();
}

TEST_F(SequenceTableBatchTest, OfThoseThatShareATailAllButTheLastGetACopy) {
  const SequenceId a = make(6);
  const SequenceId b = table_.fork(a);
  const SequenceId c = table_.fork(a);
  const PageId tail = pages_of(table_, a)[1];
  const auto copies = table_.reserve_batch(Ids{c, a, b}, Counts{1, 1, 1});
  ASSERT_TRUE(copies);
  ASSERT_EQ(copies->size(), 2u);
  EXPECT_EQ((*copies)[0].from, tail);
  EXPECT_EQ((*copies)[0].to, pages_of(table_, c)[1]);
  EXPECT_EQ((*copies)[1].from, tail);
  EXPECT_EQ((*copies)[1].to, pages_of(table_, a)[1]);
  EXPECT_EQ(pages_of(table_, b)[1], tail) << "the last holder writes in place";
  EXPECT_EQ(pool_.num_free(), 4);
  expect_clean();
}

TEST_F(SequenceTableBatchTest, TooFewPagesInAllChangesNothing) {
  const SequenceId a = make(6);
  const SequenceId b = table_.fork(a);
  const SequenceId c = table_.create();
  // One copy for a, b is then the last holder, and five pages remain for c.
  EXPECT_FALSE(table_.reserve_batch(Ids{a, b, c}, Counts{1, 1, 21}));
  EXPECT_EQ(pages_of(table_, a), pages_of(table_, b));
  for (const SequenceId seq : {a, b, c}) EXPECT_EQ(table_.num_reserved(seq), 0);
  EXPECT_EQ(pool_.num_free(), 6);
  expect_clean();
  EXPECT_TRUE(table_.reserve_batch(Ids{a, b, c}, Counts{1, 1, 20}));
  EXPECT_EQ(pool_.num_free(), 0);
  expect_clean();
}

TEST_F(SequenceTableBatchTest, PagesOfASmallerReservationServeTheSequencesBehind) {
  const SequenceId a = table_.create();
  const SequenceId b = table_.create();
  ASSERT_TRUE(table_.reserve(a, 32));
  EXPECT_FALSE(table_.reserve_batch(Ids{b, a}, Counts{4, 1})) << "b comes first";
  EXPECT_EQ(table_.num_reserved(a), 32);
  EXPECT_TRUE(table_.reserve_batch(Ids{a, b}, Counts{1, 28}));
  expect_clean();
}

TEST_F(SequenceTableBatchTest, BadBatchesThrowAndChangeNothing) {
  const SequenceId a = make(3);
  const SequenceId b = make(3);
  const SequenceId gone = table_.create();
  table_.release(gone);
  constexpr int64_t kHuge = std::numeric_limits<int64_t>::max();
  const auto append = [&](Ids seqs, Counts counts) { table_.reserve_batch(seqs, counts); };
  EXPECT_THROW(append({a, b}, {1}), std::invalid_argument);
  EXPECT_THROW(append({a, a}, {1, 1}), std::invalid_argument);
  EXPECT_THROW(append({a, b}, {1, -1}), std::invalid_argument);
  EXPECT_THROW(append({a, b}, {1, kHuge}), std::invalid_argument);
  EXPECT_THROW(append({a, b}, {1, std::numeric_limits<int64_t>::min()}), std::invalid_argument);
  EXPECT_THROW(append({a, gone}, {1, 1}), std::invalid_argument);
  EXPECT_THROW(append({a, 99}, {1, 1}), std::out_of_range);
  EXPECT_THROW(append({b, 99}, {1000, 1}), std::out_of_range) << "checked before room is";
  EXPECT_EQ(table_.num_reserved(a), 0);
  EXPECT_EQ(table_.num_reserved(b), 0);

  ASSERT_TRUE(table_.reserve_batch(Ids{a, b}, Counts{2, 2}));
  const auto commit = [&](Ids seqs, Counts counts) { table_.commit_batch(seqs, counts); };
  EXPECT_THROW(commit({a, b}, {1}), std::invalid_argument);
  EXPECT_THROW(commit({a, a}, {1, 1}), std::invalid_argument);
  EXPECT_THROW(commit({a, b}, {1, 3}), std::invalid_argument);
  EXPECT_THROW(commit({a, b}, {1, -1}), std::invalid_argument);
  EXPECT_THROW(commit({a, gone}, {1, 0}), std::invalid_argument);
  EXPECT_THROW(commit({a, -1}, {1, 0}), std::out_of_range);
  for (const SequenceId seq : {a, b}) {
    EXPECT_EQ(table_.length(seq), 3);
    EXPECT_EQ(table_.num_reserved(seq), 2);
  }
  expect_clean();
}

TEST_F(SequenceTableBatchTest, PlanAppendForeseesTheShape) {
  const SequenceId a = make(5);
  const SequenceId b = table_.create();
  const Ids seqs{a, b};
  const std::vector<int32_t> lens{4, 1};
  const auto shape = table_.plan_reserve(seqs, lens);
  ASSERT_TRUE(shape);
  EXPECT_EQ(table_.num_reserved(a), 0) << "a question";
  ASSERT_TRUE(table_.reserve_batch(seqs, Counts{4, 1}));
  const BatchShape real = table_.plan_batch(seqs, lens);
  EXPECT_EQ(shape->num_rows, real.num_rows);
  EXPECT_EQ(shape->max_pages, real.max_pages);
  EXPECT_FALSE(table_.plan_reserve(seqs, std::vector<int32_t>{4, 1000}));
  EXPECT_THROW(table_.plan_reserve(seqs, std::vector<int32_t>{4, -1}), std::invalid_argument);
  EXPECT_THROW(table_.plan_reserve(Ids{a, a}, lens), std::invalid_argument);
}

TEST(SequenceTableBatch, MoreRowsThanInt32IsRefusedBeforeAnythingChanges) {
  PagePool pool(4, std::numeric_limits<int32_t>::max());
  SequenceTable table(pool);
  const Ids seqs{table.create(), table.create()};
  const std::vector<int32_t> lens(2, std::numeric_limits<int32_t>::max());
  EXPECT_THROW(table.plan_reserve(seqs, lens), std::out_of_range);
  EXPECT_EQ(pool.num_free(), 4);
}

TEST_F(SequenceTableBatchTest, HasKnowsTheLiving) {
  const SequenceId seq = table_.create();
  EXPECT_TRUE(table_.has(seq));
  EXPECT_FALSE(table_.has(seq + 1));
  EXPECT_FALSE(table_.has(std::numeric_limits<SequenceId>::min()));
  table_.release(seq);
  EXPECT_FALSE(table_.has(seq));
}

// Two tables go through the same random operations, batched on the first and one by one on the
// second, and stay equal up to the ids of their pages.
class BatchAndSingles {
 public:
  explicit BatchAndSingles(uint32_t seed) : random_(seed) {}

  // False once the pool was too small: the single calls then stopped half way.
  bool step() {
    switch (live_.size() < 3 ? 0 : random_() % 6) {
      case 0:
        live_.push_back(table_.create());
        singles_.create();
        return true;
      case 1: {
        const SequenceId seq = live_[random_() % live_.size()];
        if (table_.num_reserved(seq) != 0) return true;
        live_.push_back(table_.fork(seq));
        singles_.fork(seq);
        return true;
      }
      case 2: {
        const size_t i = random_() % live_.size();
        table_.release(live_[i]);
        singles_.release(live_[i]);
        live_.erase(live_.begin() + static_cast<int64_t>(i));
        return true;
      }
      case 3:
        commit();
        return true;
      default:
        return append();
    }
  }

  void expect_equal() const {
    for (const SequenceId seq : live_) {
      EXPECT_EQ(table_.length(seq), singles_.length(seq));
      EXPECT_EQ(table_.num_reserved(seq), singles_.num_reserved(seq));
      EXPECT_EQ(pages_of(table_, seq), pages_of(singles_, seq));
    }
    EXPECT_EQ(pool_.num_free(), singles_pool_.num_free());
    EXPECT_EQ(table_.check_integrity(), std::nullopt);
    EXPECT_EQ(check_references(pool_, &table_, {}), std::nullopt);
  }

 private:
  Ids some_sequences() {
    Ids seqs = live_;
    std::shuffle(seqs.begin(), seqs.end(), random_);
    seqs.resize(random_() % (seqs.size() + 1));
    return seqs;
  }

  void commit() {
    const Ids seqs = some_sequences();
    Counts counts;
    for (const SequenceId seq : seqs) {
      counts.push_back(static_cast<int64_t>(random_()) % (table_.num_reserved(seq) + 1));
    }
    table_.commit_batch(seqs, counts);
    for (size_t i = 0; i < seqs.size(); ++i) singles_.commit(seqs[i], counts[i]);
  }

  bool append() {
    const Ids seqs = some_sequences();
    Counts counts;
    for (size_t i = 0; i < seqs.size(); ++i) counts.push_back(random_() % 6);
    std::vector<Pages> before;
    for (const SequenceId seq : live_) before.push_back(pages_of(table_, seq));
    const auto copies = table_.reserve_batch(seqs, counts);
    std::vector<PageCopy> expected;
    bool has_room = true;
    for (size_t i = 0; i < seqs.size() && has_room; ++i) {
      const auto more = singles_.reserve(seqs[i], counts[i]);
      has_room = more.has_value();
      if (more) expected.insert(expected.end(), more->begin(), more->end());
    }
    EXPECT_EQ(copies.has_value(), has_room);
    if (!copies || !has_room) {
      for (size_t i = 0; i < live_.size(); ++i) EXPECT_EQ(pages_of(table_, live_[i]), before[i]);
      EXPECT_EQ(check_references(pool_, &table_, {}), std::nullopt);
      return false;
    }
    EXPECT_EQ(copies->size(), expected.size());
    for (size_t i = 0; i < std::min(copies->size(), expected.size()); ++i) {
      EXPECT_EQ((*copies)[i].from, expected[i].from);
      EXPECT_EQ((*copies)[i].to, expected[i].to);
    }
    return true;
  }

  std::mt19937 random_;
  PagePool pool_{12, 3};
  SequenceTable table_{pool_};
  PagePool singles_pool_{12, 3};
  SequenceTable singles_{singles_pool_};
  Ids live_;
};

TEST(SequenceTableBatch, EqualsSingleCalls) {
  int num_refused = 0;
  for (uint32_t seed = 0; seed < 200; ++seed) {
    BatchAndSingles both(seed);
    for (int step = 0; step < 100; ++step) {
      if (!both.step()) {
        ++num_refused;
        break;
      }
      both.expect_equal();
      if (testing::Test::HasFailure()) FAIL() << "seed " << seed << ", step " << step;
    }
  }
  EXPECT_GT(num_refused, 20);
}

}  // namespace
}  // namespace skv
