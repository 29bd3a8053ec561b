#include "csrc/core/thread_pool.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cfenv>
#include <chrono>
#include <thread>
#include <vector>

namespace skv {
namespace {

// How often each index was visited by one run.
std::vector<int> visits(ThreadPool& pool, int64_t n, int64_t grain, int num_threads) {
  std::vector<std::atomic<int>> counts(static_cast<size_t>(n));
  pool.run(n, grain, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) counts[static_cast<size_t>(i)].fetch_add(1);
  });
  return {counts.begin(), counts.end()};
}

TEST(ThreadPool, CoversEveryIndexOnce) {
  ThreadPool pool;
  for (int64_t n : {0, 1, 2, 3, 7, 64, 1000}) {
    for (int64_t grain : {1, 5, 2000}) {
      for (int threads : {1, 2, 3, 8}) {
        EXPECT_EQ(visits(pool, n, grain, threads), std::vector<int>(static_cast<size_t>(n), 1));
      }
    }
  }
}

TEST(ThreadPool, StartsNoMoreThreadsThanAskedFor) {
  ThreadPool pool;
  visits(pool, 100, 1, 1);
  EXPECT_EQ(pool.num_workers(), 0);
  visits(pool, 100, 1, 3);
  EXPECT_EQ(pool.num_workers(), 2);
  visits(pool, 100, 60, 8);  // one range only
  EXPECT_EQ(pool.num_workers(), 2);
}

TEST(ThreadPool, RangesRunOnSeveralThreads) {
  ThreadPool pool;
  // Each range waits for the other one to begin, so both must be under way at once.
  std::atomic<int> begun{0};
  pool.run(2, 1, 2, [&](int64_t, int64_t) {
    begun.fetch_add(1);
    while (begun.load() < 2) std::this_thread::yield();
  });
  EXPECT_EQ(begun.load(), 2);
}

TEST(ThreadPool, WakesSleepingWorkers) {
  ThreadPool pool;
  for (int round = 0; round < 20; ++round) {
    std::atomic<int> begun{0};
    pool.run(2, 1, 2, [&](int64_t, int64_t) {
      begun.fetch_add(1);
      while (begun.load() < 2) std::this_thread::yield();
    });
    std::this_thread::sleep_for(std::chrono::milliseconds(2));  // longer than they spin
  }
}

TEST(ThreadPool, ManyShortJobs) {
  ThreadPool pool;
  std::atomic<int64_t> total{0};
  for (int round = 0; round < 20000; ++round) {
    pool.run(4, 1, 4, [&](int64_t begin, int64_t end) { total.fetch_add(end - begin); });
  }
  EXPECT_EQ(total.load(), 80000);
}

TEST(ThreadPool, NestedAndConcurrentCallsRunInTheCaller) {
  ThreadPool pool;
  std::atomic<int64_t> total{0};
  const auto outer = [&](int64_t, int64_t) {
    pool.run(10, 1, 4, [&](int64_t begin, int64_t end) { total.fetch_add(end - begin); });
  };
  std::vector<std::thread> callers;
  for (int i = 0; i < 4; ++i) {
    callers.emplace_back([&] {
      for (int round = 0; round < 500; ++round) pool.run(2, 1, 2, outer);
    });
  }
  for (std::thread& caller : callers) caller.join();
  // A run in the caller is one range, else there are two; each makes a nested run of ten.
  EXPECT_GE(total.load(), 4 * 500 * 10);
  EXPECT_EQ(total.load() % 10, 0);
}

TEST(ThreadPool, WorkersRoundAsTheCaller) {
  ThreadPool pool;
  const int before = std::fegetround();
  for (int mode : {FE_UPWARD, FE_TONEAREST, FE_DOWNWARD}) {
    std::fesetround(mode);
    std::atomic<int> begun{0};
    std::atomic<int> wrong{0};
    pool.run(2, 1, 2, [&](int64_t, int64_t) {
      begun.fetch_add(1);
      while (begun.load() < 2) std::this_thread::yield();  // one range is the worker's
      volatile float third = 1.0F;
      third = third / 3.0F;
      // The nearest float lies above a third, so only downward tells the modes apart.
      const bool is_down = third < 0.33333333F;
      if (is_down != (mode == FE_DOWNWARD)) wrong.fetch_add(1);
    });
    EXPECT_EQ(wrong.load(), 0) << "mode " << mode;
  }
  std::fesetround(before);
}

TEST(ThreadPool, AChildProcessHasItsOwn) {
  visits(ThreadPool::instance(), 100, 1, 3);
  const pid_t child = fork();
  if (child == 0) {
    const bool is_right = visits(ThreadPool::instance(), 100, 1, 3) == std::vector<int>(100, 1) &&
                          ThreadPool::instance().num_workers() == 2;
    _exit(is_right ? 0 : 1);
  }
  int status = -1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

}  // namespace
}  // namespace skv
