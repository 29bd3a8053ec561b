#include "csrc/core/ngram_index.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <stdexcept>
#include <vector>

namespace skv {

class NgramIndexTestPeer {
 public:
  explicit NgramIndexTestPeer(NgramIndex& index) : state_(index.own_state()) {}
  std::vector<TokenId>& tokens() { return state_.tokens; }
  std::vector<int32_t>& previous() { return state_.previous; }
  int64_t& num_entries() { return state_.num_entries; }
  void move_entry() {
    for (auto& entry : state_.table) {
      if (entry.last != NgramIndex::kNowhere) {
        entry.last ^= 1;
        return;
      }
    }
  }
  void drop_last_row() { state_.previous.pop_back(); }

 private:
  NgramIndex::State& state_;
};

namespace {

using Tokens = std::vector<int32_t>;

TokenSpan view(const Tokens& tokens) { return std::span<const int32_t>(tokens); }

// The rule, word for word.
Draft naive_propose(const Tokens& text, int64_t min_n, int64_t max_n, int64_t max_tokens) {
  const auto size = std::ssize(text);
  for (int64_t n = std::min(max_n, size - 1); n >= min_n; --n) {
    for (int64_t end = size - 1; end >= n; --end) {  // the occurrence is [end - n, end)
      if (!std::equal(text.end() - n, text.end(), text.begin() + (end - n))) continue;
      Tokens known = text;
      const bool overlaps = end > size - n;
      Draft draft{{}, n};
      for (int64_t i = end; i < std::ssize(known) && std::ssize(draft.tokens) < max_tokens; ++i) {
        draft.tokens.push_back(known[static_cast<size_t>(i)]);
        if (overlaps) known.push_back(draft.tokens.back());
      }
      return draft;
    }
  }
  return {};
}

TEST(NgramIndex, ProposesWhatFollowed) {
  NgramIndex index;
  index.append(view({1, 2, 3, 4, 5, 1, 2, 3}));
  const Draft draft = index.propose(4);
  EXPECT_EQ(draft.match_len, 3);
  EXPECT_EQ(draft.tokens, (Tokens{4, 5, 1, 2}));
  EXPECT_EQ(index.propose(9).tokens, (Tokens{4, 5, 1, 2, 3})) << "stops where the text ends";
  EXPECT_EQ(index.propose(0).tokens, Tokens{});
}

TEST(NgramIndex, LongestSuffixThenMostRecent) {
  NgramIndex index;
  index.append(view({7, 1, 2, 3, 9, 1, 2, 5, 8, 1, 2, 6, 7, 1, 2}));
  EXPECT_EQ(index.propose(1).tokens, Tokens{3}) << "7 1 2 is longer than the later 1 2";
  EXPECT_EQ(index.propose(1).match_len, 3);
  index.append(view({0, 1, 2}));
  EXPECT_EQ(index.propose(1).tokens, Tokens{0});
}

TEST(NgramIndex, PeriodicTextGoesOn) {
  NgramIndex index;
  index.append(view({4, 5, 6, 4, 5, 6, 4, 5}));
  EXPECT_EQ(index.propose(7).tokens, (Tokens{6, 4, 5, 6, 4, 5, 6}));
  NgramIndex same;
  same.append(view({3, 3, 3}));
  EXPECT_EQ(same.propose(5).tokens, (Tokens(5, 3)));
}

TEST(NgramIndex, NothingToPropose) {
  NgramIndex index;
  EXPECT_EQ(index.propose(4).match_len, 0);
  index.append(view({1}));
  index.append(view({1}));
  EXPECT_EQ(index.propose(4).match_len, 0) << "one token is shorter than min_n";
  NgramIndex unigrams(1, 1);
  unigrams.append(view({1, 1}));
  EXPECT_EQ(unigrams.propose(2).tokens, Tokens{1}) << "neighbours do not overlap";
}

TEST(NgramIndex, BadCallsChangeNothing) {
  EXPECT_THROW(NgramIndex(0, 4), std::invalid_argument);
  EXPECT_THROW(NgramIndex(5, 4), std::invalid_argument);
  EXPECT_THROW(NgramIndex(2, 65), std::invalid_argument);
  NgramIndex index;
  index.append(view({1, 2, 3}));
  EXPECT_THROW(index.append(view({4, -1})), std::invalid_argument);
  EXPECT_THROW(index.truncate(4), std::invalid_argument);
  EXPECT_THROW(index.truncate(-1), std::invalid_argument);
  EXPECT_THROW(index.propose(-1), std::invalid_argument);
  EXPECT_EQ(index.size(), 3);
  EXPECT_EQ(index.check_integrity(), std::nullopt);
}

TEST(NgramIndex, ForksGoTheirOwnWay) {
  NgramIndex index;
  index.append(view({1, 2, 3, 1, 2}));
  NgramIndex child = index.fork();
  child.append(view({9, 1, 2}));
  index.truncate(3);
  EXPECT_EQ(child.propose(1).tokens, Tokens{9});
  EXPECT_EQ(index.size(), 3);
  EXPECT_EQ(index.propose(1).match_len, 0);
  EXPECT_EQ(index.check_integrity(), std::nullopt);
  EXPECT_EQ(child.check_integrity(), std::nullopt);
}

TEST(NgramIndex, ACollisionIsNeverAMatch) {
  NgramIndex index(2, 2);
  index.append(view({1, 2, 3, 9, 9, 1, 2}));
  NgramIndexTestPeer peer(index);
  // As if "9 9" had the key of "1 2": its end lies on the way from 6 to 1.
  peer.previous()[6] = 4;
  peer.previous()[4] = 1;
  EXPECT_EQ(index.propose(1).tokens, Tokens{3});
  peer.previous()[4] = -1;
  EXPECT_EQ(index.propose(1).match_len, 0);
}

class NgramIndexRandom : public testing::TestWithParam<std::tuple<int, int, int>> {};

TEST_P(NgramIndexRandom, AgreesWithTheRule) {
  const auto [min_n, max_n, vocabulary] = GetParam();
  std::mt19937 random(5);
  NgramIndex index(min_n, max_n);
  Tokens text;
  for (int step = 0; step < 400; ++step) {
    if (random() % 4 == 0) {
      text.resize(text.size() - random() % (text.size() / (random() % 20 == 0 ? 1 : 8) + 1));
      index.truncate(std::ssize(text));
    } else {
      Tokens more(random() % (step % 50 == 0 ? 300 : 6));
      for (int32_t& token : more) token = static_cast<int32_t>(random()) & 0x7fffffff;
      for (int32_t& token : more) token %= vocabulary;
      index.append(view(more));
      text.insert(text.end(), more.begin(), more.end());
    }
    const int64_t limit = static_cast<int64_t>(random() % 12);
    const Draft draft = index.propose(limit);
    const Draft naive = naive_propose(text, min_n, max_n, limit);
    ASSERT_EQ(draft.match_len, naive.match_len);
    ASSERT_EQ(draft.tokens, naive.tokens);
    if (step % 5 == 0) {
      ASSERT_EQ(index.check_integrity(), std::nullopt);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, NgramIndexRandom,
                         testing::Values(std::tuple(2, 8, 2), std::tuple(2, 8, 4),
                                         std::tuple(1, 3, 30), std::tuple(3, 3, 3),
                                         std::tuple(1, 64, 2)));

TEST(NgramIndex, FindsPlantedBugs) {
  NgramIndex index;
  index.append(view({1, 2, 3, 4, 1, 2, 3, 1, 2, 3}));
  ASSERT_EQ(index.check_integrity(), std::nullopt);
  const auto expect_problem = [](NgramIndex broken, auto plant, const char* part) {
    NgramIndexTestPeer peer(broken);
    plant(peer);
    const auto problem = broken.check_integrity();
    ASSERT_TRUE(problem) << part;
    EXPECT_NE(problem->find(part), std::string::npos) << *problem;
  };
  using Peer = NgramIndexTestPeer;
  const size_t row = 9 * 7;  // the last position, n = 2
  expect_problem(index, [&](Peer& p) { p.previous()[row] = 2; }, "is wrong");
  expect_problem(index, [&](Peer& p) { p.previous()[row] = -1; }, "is wrong");
  expect_problem(index, [&](Peer& p) { p.previous()[row] = 9; }, "out of order");
  expect_problem(index, [&](Peer& p) { p.previous()[0] = 0; }, "before the text");
  expect_problem(index, [&](Peer& p) { p.tokens()[4] = 7; }, "is wrong");
  expect_problem(index, [&](Peer& p) { p.move_entry(); }, "table entry");
  expect_problem(index, [&](Peer& p) { p.num_entries() += 1; }, "num_entries");
  expect_problem(index, [&](Peer& p) { p.num_entries() = 1000; }, "too full");
  expect_problem(index, [&](Peer& p) { p.drop_last_row(); }, "differ in length");
  EXPECT_EQ(index.check_integrity(), std::nullopt);
}

}  // namespace
}  // namespace skv
