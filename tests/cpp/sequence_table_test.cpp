#include "csrc/core/sequence_table.h"

#include <gtest/gtest.h>

#include <random>
#include <stdexcept>
#include <vector>

#include "csrc/core/references.h"

namespace skv {

class SequenceTableTestPeer {
 public:
  static std::vector<PageId>& pages(SequenceTable& table, SequenceId seq) {
    return table.find(seq).own_pages();
  }
  static int64_t& committed_len(SequenceTable& table, SequenceId seq) {
    return table.find(seq).committed_len;
  }
};

namespace {

using Pages = std::vector<PageId>;

class SequenceTableTest : public testing::Test {
 protected:
  SequenceId make(int64_t num_tokens) {
    const SequenceId seq = table_.create();
    EXPECT_TRUE(table_.reserve(seq, num_tokens));
    table_.commit(seq, num_tokens);
    return seq;
  }
  Pages pages(SequenceId seq) const {
    const auto view = table_.page_table(seq);
    return {view.begin(), view.end()};
  }
  void expect_clean() const {
    EXPECT_EQ(pool_.check_integrity(), std::nullopt);
    EXPECT_EQ(table_.check_integrity(), std::nullopt);
    EXPECT_EQ(check_references(pool_, &table_, {}), std::nullopt);
  }

  PagePool pool_{8, 4};
  SequenceTable table_{pool_};
};

TEST_F(SequenceTableTest, AppendReservesAndCommitTrims) {
  const SequenceId seq = table_.create();
  EXPECT_EQ(table_.pages_needed(seq, 9), 3);
  const auto copies = table_.reserve(seq, 9);
  ASSERT_TRUE(copies);
  EXPECT_TRUE(copies->empty());
  EXPECT_EQ(table_.length(seq), 0);
  EXPECT_EQ(table_.num_reserved(seq), 9);
  EXPECT_EQ(table_.num_pages(seq), 3);
  table_.commit(seq, 5);
  EXPECT_EQ(table_.length(seq), 5);
  EXPECT_EQ(table_.num_reserved(seq), 0);
  EXPECT_EQ(table_.num_pages(seq), 2);
  EXPECT_EQ(table_.pages_needed(seq, 3), 0);
  EXPECT_EQ(table_.pages_needed(seq, 4), 1);
  expect_clean();
}

TEST_F(SequenceTableTest, AppendReplacesTheReservation) {
  const SequenceId seq = make(3);
  ASSERT_TRUE(table_.reserve(seq, 12));
  EXPECT_EQ(table_.num_pages(seq), 4);
  ASSERT_TRUE(table_.reserve(seq, 2));
  EXPECT_EQ(table_.num_reserved(seq), 2);
  EXPECT_EQ(table_.num_pages(seq), 2);
  ASSERT_TRUE(table_.reserve(seq, 0));
  EXPECT_EQ(table_.num_pages(seq), 1);
  expect_clean();
}

TEST_F(SequenceTableTest, TooFewPagesChangesNothing) {
  const SequenceId seq = make(6);
  const SequenceId child = table_.fork(seq);
  EXPECT_EQ(table_.pages_needed(child, 26), 7);
  EXPECT_FALSE(table_.reserve(child, 26)) << "6 free pages";
  EXPECT_EQ(table_.num_reserved(child), 0);
  EXPECT_EQ(pages(child), pages(seq));
  EXPECT_TRUE(table_.reserve(child, 22)) << "one copy and five fresh pages";
  expect_clean();
}

TEST_F(SequenceTableTest, ForkSharesAndTheWriterMoves) {
  const SequenceId parent = make(6);
  const Pages before = pages(parent);
  const SequenceId child = table_.fork(parent);
  EXPECT_EQ(pages(child), before);
  EXPECT_EQ(pool_.num_free(), 6);
  const auto copies = table_.reserve(child, 1);
  ASSERT_TRUE(copies);
  ASSERT_EQ(copies->size(), 1u);
  EXPECT_EQ(copies->front().from, before[1]);
  EXPECT_EQ(copies->front().to, pages(child)[1]);
  EXPECT_NE(copies->front().to, before[1]);
  EXPECT_EQ(pages(child)[0], before[0]);
  EXPECT_EQ(pages(parent), before);
  table_.commit(child, 1);
  EXPECT_TRUE(table_.reserve(parent, 1)->empty()) << "the last holder writes in place";
  expect_clean();
}

TEST_F(SequenceTableTest, NoCopyAtAPageBorder) {
  const SequenceId parent = make(8);
  const SequenceId child = table_.fork(parent);
  EXPECT_EQ(table_.pages_needed(child, 1), 1);
  EXPECT_TRUE(table_.reserve(child, 1)->empty());
  expect_clean();
}

TEST_F(SequenceTableTest, TruncateThenAppendHasTheShapeOfNever) {
  const SequenceId seq = make(11);
  table_.truncate(seq, 5);
  EXPECT_EQ(table_.num_pages(seq), 2);
  table_.truncate(seq, 0);
  EXPECT_EQ(table_.num_pages(seq), 0);
  EXPECT_EQ(pool_.num_free(), 8);
  ASSERT_TRUE(table_.reserve(seq, 4));
  table_.truncate(seq, 0);
  EXPECT_EQ(table_.num_reserved(seq), 0);
  expect_clean();
}

TEST_F(SequenceTableTest, ForkingManyWaysAndClosingReturnsEverything) {
  const SequenceId parent = make(10);
  std::vector<SequenceId> children;
  for (int i = 0; i < 100; ++i) children.push_back(table_.fork(parent));
  EXPECT_EQ(pool_.num_free(), 5);
  table_.truncate(parent, 2);
  table_.truncate(children[0], 3);
  for (const SequenceId child : children) table_.release(child);
  expect_clean();
  table_.release(parent);
  EXPECT_EQ(pool_.num_free(), 8);
  EXPECT_EQ(table_.num_sequences(), 0);
  expect_clean();
}

TEST_F(SequenceTableTest, AdoptAndReplacePrefix) {
  const SequenceId first = make(9);
  const SequenceId adopted = table_.adopt(pages(first), 9);
  EXPECT_EQ(table_.length(adopted), 9);
  expect_clean();
  const SequenceId second = make(9);
  Pages canonical = pages(first);
  canonical.resize(2);
  const PageId tail = pages(second)[2];
  table_.replace_prefix(second, canonical);
  EXPECT_EQ(pages(second), (Pages{canonical[0], canonical[1], tail}));
  EXPECT_EQ(pool_.num_free(), 4);
  table_.replace_prefix(second, canonical);
  expect_clean();
}

TEST_F(SequenceTableTest, BadCallsThrowAndChangeNothing) {
  const SequenceId seq = make(6);
  const Pages before = pages(seq);
  EXPECT_THROW(table_.reserve(seq, -1), std::invalid_argument);
  EXPECT_THROW(table_.reserve(seq, int64_t{1} << 62), std::invalid_argument);
  EXPECT_THROW(table_.commit(seq, 1), std::invalid_argument);
  EXPECT_THROW(table_.commit(seq, -1), std::invalid_argument);
  EXPECT_THROW(table_.truncate(seq, 7), std::invalid_argument);
  EXPECT_THROW(table_.truncate(seq, -1), std::invalid_argument);
  EXPECT_THROW(table_.adopt(before, 9), std::invalid_argument);
  EXPECT_THROW(table_.adopt(before, -1), std::invalid_argument);
  EXPECT_THROW(table_.adopt(Pages{0, 7}, 6), std::invalid_argument) << "page 7 is free";
  EXPECT_THROW(table_.adopt(Pages{0, 8}, 6), std::out_of_range);
  EXPECT_THROW(table_.adopt(Pages{0, 0}, 6), std::invalid_argument);
  EXPECT_THROW(table_.replace_prefix(seq, before), std::invalid_argument) << "not full";
  EXPECT_THROW(table_.replace_prefix(seq, Pages{before[1]}), std::invalid_argument);
  EXPECT_EQ(pages(seq), before);
  expect_clean();
  ASSERT_TRUE(table_.reserve(seq, 1));
  EXPECT_THROW(table_.fork(seq), std::invalid_argument) << "reserved slots";
  table_.release(seq);
  EXPECT_THROW(table_.release(seq), std::invalid_argument);
  EXPECT_THROW(table_.length(seq), std::invalid_argument);
  EXPECT_THROW(table_.length(seq + 1), std::out_of_range);
  EXPECT_THROW(table_.length(-1), std::out_of_range);
  expect_clean();
}

TEST_F(SequenceTableTest, FillBatch) {
  const SequenceId a = make(5);
  const SequenceId b = table_.create();
  ASSERT_TRUE(table_.reserve(a, 2));
  ASSERT_TRUE(table_.reserve(b, 1));
  const std::vector<SequenceId> seqs{a, b};
  const std::vector<int32_t> lens{2, 1};
  const BatchShape shape = table_.plan_batch(seqs, lens);
  EXPECT_EQ(shape.num_rows, 3);
  EXPECT_EQ(shape.max_pages, 2);
  std::vector<int32_t> page_table(4), seq_lens(2), offsets(3), positions(3);
  std::vector<int64_t> slots(3);
  table_.fill_batch(
      seqs, lens, shape,
      {page_table.data(), seq_lens.data(), offsets.data(), positions.data(), slots.data()});
  const Pages pa = pages(a), pb = pages(b);
  EXPECT_EQ(page_table, (Pages{pa[0], pa[1], pb[0], -1}));
  EXPECT_EQ(seq_lens, (std::vector<int32_t>{7, 1}));
  EXPECT_EQ(offsets, (std::vector<int32_t>{0, 2, 3}));
  EXPECT_EQ(positions, (std::vector<int32_t>{5, 6, 0}));
  EXPECT_EQ(slots, (std::vector<int64_t>{pa[1] * 4 + 1, pa[1] * 4 + 2, pb[0] * 4}));
  EXPECT_THROW(table_.plan_batch(seqs, std::vector<int32_t>{3, 1}), std::invalid_argument);
  EXPECT_THROW(table_.plan_batch(seqs, std::vector<int32_t>{-1, 1}), std::invalid_argument);
  EXPECT_THROW(table_.plan_batch(seqs, std::vector<int32_t>{1}), std::invalid_argument);
  EXPECT_THROW(table_.plan_batch(std::vector<SequenceId>{a, a}, lens), std::invalid_argument);
}

TEST_F(SequenceTableTest, DestructionReleases) {
  {
    SequenceTable other(pool_);
    other.reserve(other.create(), 13);
    EXPECT_EQ(pool_.num_free(), 4);
  }
  EXPECT_EQ(pool_.num_free(), 8);
}

TEST_F(SequenceTableTest, RandomOperationsStayClean) {
  std::mt19937 random(3);
  std::vector<SequenceId> live;
  for (int step = 0; step < 5000; ++step) {
    if (live.empty() || random() % 8 == 0) live.push_back(table_.create());
    const size_t i = random() % live.size();
    const SequenceId seq = live[i];
    switch (random() % 5) {
      case 0:
      case 1: {
        const int64_t n = random() % 6;
        const int64_t length = table_.length(seq);
        const int64_t needed = table_.pages_needed(seq, n);
        const int64_t num_free = pool_.num_free();
        const auto copies = table_.reserve(seq, n);
        ASSERT_EQ(copies.has_value(), needed <= num_free);
        if (copies) table_.commit(seq, random() % static_cast<uint64_t>(n + 1));
        ASSERT_GE(table_.length(seq), length);
        break;
      }
      case 2:
        table_.truncate(seq, random() % static_cast<uint64_t>(table_.length(seq) + 1));
        break;
      case 3:
        if (table_.num_reserved(seq) == 0) live.push_back(table_.fork(seq));
        break;
      default:
        table_.release(seq);
        live.erase(live.begin() + static_cast<int64_t>(i));
    }
    ASSERT_EQ(table_.check_integrity(), std::nullopt);
    ASSERT_EQ(check_references(pool_, &table_, {}), std::nullopt);
  }
}

// Planted bugs: each must be found.
TEST_F(SequenceTableTest, FindsPlantedBugs) {
  const SequenceId seq = make(6);
  const SequenceId other = make(4);
  using Peer = SequenceTableTestPeer;
  const auto expect_problem = [&](const char* part) {
    const auto problem = table_.check_integrity();
    ASSERT_TRUE(problem) << part;
    EXPECT_NE(problem->find(part), std::string::npos) << *problem;
  };
  Pages& list = Peer::pages(table_, seq);
  const PageId page = list[1];
  list[1] = list[0];
  expect_problem("stands twice");
  list[1] = 99;
  expect_problem("not in the pool");
  list[1] = Peer::pages(table_, other)[0];
  expect_problem("held by more sequences");
  list[1] = page;
  Peer::committed_len(table_, seq) = 7;
  expect_problem("committed_len");
  Peer::committed_len(table_, seq) = 6;
  list.push_back(5);
  expect_problem("page count");
  list.pop_back();
  ASSERT_TRUE(table_.reserve(seq, 1));
  pool_.retain(Pages{page});
  expect_problem("reserved for writing but shared");
  EXPECT_TRUE(check_references(pool_, &table_, {})) << "a reference that nobody owns";
  pool_.release(Pages{page});
  expect_clean();
}

}  // namespace
}  // namespace skv
