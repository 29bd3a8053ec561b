// What an engine thread shares with others: the state objects have no locks, so whoever holds the
// one mutex may use them, and the thread pool takes callers in turn and at once. Run with
// ThreadSanitizer by `make test-tsan`.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "csrc/core/ngram_index.h"
#include "csrc/core/propose_drafts.h"
#include "csrc/core/radix_tree.h"
#include "csrc/core/references.h"
#include "csrc/core/sequence_table.h"
#include "csrc/core/thread_pool.h"

namespace skv {
namespace {

constexpr int kNumThreads = 4;
constexpr int kNumRounds = 200;

void run_threads(auto work) {
  std::vector<std::thread> threads;
  for (int i = 0; i < kNumThreads; ++i) threads.emplace_back([&work, i] { work(i); });
  for (std::thread& thread : threads) thread.join();
}

std::vector<TokenId> some_tokens(std::mt19937& random) {
  std::vector<TokenId> tokens(1 + random() % 20);
  for (TokenId& token : tokens) token = static_cast<TokenId>(random() % 2);
  return tokens;
}

TEST(StateThreads, OneMutexIsEnough) {
  std::mutex mutex;
  PagePool pool(64, 4);
  SequenceTable table(pool);
  RadixTree tree(pool);
  NgramIndex index;
  run_threads([&](int thread) {
    std::mt19937 random(static_cast<uint32_t>(thread));
    for (int round = 0; round < kNumRounds; ++round) {
      const std::vector<TokenId> tokens = some_tokens(random);
      const TokenSpan span{std::span<const TokenId>(tokens)};
      const auto size = static_cast<int64_t>(tokens.size());
      const std::lock_guard lock(mutex);
      const Match match = tree.match(0, span);
      const SequenceId seq = table.adopt(match.pages, match.num_tokens);
      tree.touch(match);
      const std::vector<SequenceId> seqs{seq, table.fork(seq)};
      const std::vector<int64_t> rest(2, size - match.num_tokens);
      if (!table.reserve_batch(seqs, rest)) {
        tree.evict(32);
      } else {
        table.commit_batch(seqs, rest);
        tree.insert(0, span, table.page_table(seqs[round % 2]));
      }
      for (const SequenceId done : seqs) table.release(done);
      NgramIndex* const pointer = &index;
      const int64_t limit = 4;
      propose_drafts({&pointer, 1}, {&span, 1}, {&limit, 1});
      if (index.size() > 200) index.truncate(100);
    }
  });
  EXPECT_EQ(pool.check_integrity(), std::nullopt);
  EXPECT_EQ(tree.check_integrity(), std::nullopt);
  EXPECT_EQ(index.check_integrity(), std::nullopt);
  const RadixTree* const trees[] = {&tree};
  EXPECT_EQ(check_references(pool, &table, trees), std::nullopt);
  EXPECT_EQ(table.num_sequences(), 0);
}

TEST(StateThreads, ObjectsMoveFromThreadToThread) {
  PagePool pool(16, 4);
  std::unique_ptr<SequenceTable> table;
  std::unique_ptr<RadixTree> tree;
  SequenceId seq = 0;
  const std::vector<TokenId> tokens{1, 2, 3, 4, 5};
  const TokenSpan span{std::span<const TokenId>(tokens)};
  std::thread([&] {
    table = std::make_unique<SequenceTable>(pool);
    seq = table->create();
    ASSERT_TRUE(table->reserve(seq, 5));
    table->commit(seq, 5);
  }).join();
  std::thread([&] {
    tree = std::make_unique<RadixTree>(pool);
    tree->insert(0, span, table->page_table(seq));
    table.reset();
  }).join();
  EXPECT_EQ(tree->match(0, span).num_tokens, 5);
  std::thread([&] { tree.reset(); }).join();
  EXPECT_EQ(pool.num_free(), 16);
}

// Forks share their text until one of the two changes, also when they belong to different threads.
TEST(StateThreads, ForksOfAnIndexUnderOneMutex) {
  std::mutex mutex;
  NgramIndex root;
  const std::vector<TokenId> text{1, 2, 3, 1, 2, 3, 1, 2};
  root.append(std::span<const TokenId>(text));
  run_threads([&](int thread) {
    NgramIndex own;
    for (int round = 0; round < kNumRounds; ++round) {
      const std::lock_guard lock(mutex);
      if (round % 8 == 0) own = root.fork();
      const std::vector<TokenId> more{static_cast<TokenId>(thread), 2};
      own.append(std::span<const TokenId>(more));
      EXPECT_GE(own.propose(3).match_len, 0);
    }
    const std::lock_guard lock(mutex);
    EXPECT_EQ(own.check_integrity(), std::nullopt);
    own = NgramIndex();
  });
  EXPECT_EQ(root.size(), 8);
}

TEST(StateThreads, TreesMadeAtOnceHaveNumbersOfTheirOwn) {
  PagePool pool(4, 4);
  std::mutex mutex;
  std::vector<uint64_t> numbers;
  run_threads([&](int) {
    for (int round = 0; round < kNumRounds; ++round) {
      const RadixTree tree(pool);
      const uint64_t number = tree.match(0, {}).node.tree;
      const std::lock_guard lock(mutex);
      numbers.push_back(number);
    }
  });
  std::sort(numbers.begin(), numbers.end());
  EXPECT_EQ(std::adjacent_find(numbers.begin(), numbers.end()), numbers.end());
}

// 0 + 1 + ... + (n - 1), each addend written by whichever thread gets its range.
int64_t sum_on(ThreadPool& pool, int64_t n) {
  std::vector<int64_t> values(static_cast<size_t>(n));
  pool.run(n, 1, 3, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) values[static_cast<size_t>(i)] = i;
  });
  int64_t sum = 0;
  for (const int64_t value : values) sum += value;
  return sum;
}

TEST(StateThreads, ThePoolServesThreadsInTurn) {
  ThreadPool pool;
  std::mutex mutex;
  run_threads([&](int) {
    for (int round = 0; round < kNumRounds; ++round) {
      const std::lock_guard lock(mutex);
      ASSERT_EQ(sum_on(pool, 100), 4950);
    }
  });
  EXPECT_LE(pool.num_workers(), 2);
}

TEST(StateThreads, ThePoolServesThreadsAtOnce) {
  ThreadPool pool;
  run_threads([&](int) {
    for (int round = 0; round < kNumRounds; ++round) ASSERT_EQ(sum_on(pool, 100), 4950);
  });
}

// values[8 i + j] = 8 i + j, by runs inside a run.
void fill_nested(ThreadPool& pool, std::vector<int64_t>& values, auto check) {
  pool.run(8, 1, 3, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const std::thread::id outer = std::this_thread::get_id();
      pool.run(8, 1, 3, [&](int64_t from, int64_t to) {
        check(outer == std::this_thread::get_id());
        for (int64_t j = from; j < to; ++j) values[static_cast<size_t>(8 * i + j)] = 8 * i + j;
      });
    }
  });
}

TEST(StateThreads, ANestedRunStaysInItsThread) {
  ThreadPool pool;
  for (int round = 0; round < kNumRounds; ++round) {
    std::vector<int64_t> values(64);
    std::atomic<int> num_moved{0};
    fill_nested(pool, values, [&](bool is_same) { num_moved += is_same ? 0 : 1; });
    EXPECT_EQ(num_moved.load(), 0);
    for (int64_t i = 0; i < 64; ++i) ASSERT_EQ(values[static_cast<size_t>(i)], i);
  }
}

TEST(StateThreads, NestedRunsOfSeveralThreads) {
  ThreadPool pool;
  run_threads([&](int) {
    for (int round = 0; round < kNumRounds; ++round) {
      std::vector<int64_t> values(64);
      fill_nested(pool, values, [](bool) {});
      for (int64_t i = 0; i < 64; ++i) ASSERT_EQ(values[static_cast<size_t>(i)], i);
    }
  });
}

}  // namespace
}  // namespace skv
