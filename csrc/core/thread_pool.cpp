#include "csrc/core/thread_pool.h"

#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <new>
#include <system_error>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace skv {
namespace {

// How long an idle worker looks for work before it sleeps: longer than the gap between two kernels
// of a step, shorter than what a person or another process would notice.
constexpr std::chrono::microseconds kSpinTime{200};
// How long the caller spins for a range somebody else has begun before it offers its core.
constexpr int kSpinsBeforeYield = 256;

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Rounding mode, denormals and exception masks; not the sticky flags of exceptions that happened.
uint32_t get_float_control() {
#if defined(__x86_64__)
  return _mm_getcsr() & ~0x3Fu;
#elif defined(__aarch64__)
  uint64_t control;  // the upper half is reserved, the sticky flags are in FPSR
  asm volatile("mrs %0, fpcr" : "=r"(control));
  return static_cast<uint32_t>(control);
#else
  return 0;
#endif
}

void set_float_control([[maybe_unused]] uint32_t control) {
#if defined(__x86_64__)
  if (get_float_control() != control) _mm_setcsr(control);
#elif defined(__aarch64__)
  if (get_float_control() != control) {
    asm volatile("msr fpcr, %0" ::"r"(static_cast<uint64_t>(control)));
  }
#endif
}

struct Leave {
  std::atomic<bool>& flag;
  ~Leave() { flag.store(false, std::memory_order_release); }
};

std::atomic<ThreadPool*> process_pool{nullptr};

// The parent's workers do not exist in the child; its pool is left alone, locks and all.
void replace_pool_in_child() { process_pool.store(new (std::nothrow) ThreadPool); }

ThreadPool* make_process_pool() {
  pthread_atfork(nullptr, nullptr, &replace_pool_in_child);
  auto* pool = new ThreadPool;
  process_pool.store(pool);
  return pool;
}

}  // namespace

ThreadPool& ThreadPool::instance() {
  static ThreadPool* const first = make_process_pool();
  ThreadPool* const pool = process_pool.load(std::memory_order_relaxed);
  return pool != nullptr ? *pool : *first;
}

ThreadPool::~ThreadPool() {
  is_stopping_.store(true);
  epoch_.fetch_add(1);
  epoch_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::run(int64_t n, int64_t grain, int num_threads, RangeBody body) {
  if (n <= 0) return;
  int64_t ranges = std::min<int64_t>(num_threads, n / std::max<int64_t>(grain, 1));
  ranges = std::min<int64_t>(ranges, kRangeMask);
  if (ranges < 2 || has_job_.exchange(true, std::memory_order_acquire)) return body(0, n);
  const Leave leave{has_job_};
  start_workers(static_cast<size_t>(ranges - 1));

  body_ = &body;
  size_ = n;
  num_ranges_ = ranges;
  float_control_ = get_float_control();
  num_done_.store(0, std::memory_order_relaxed);
  const uint64_t job = (claim_.load(std::memory_order_relaxed) >> (2 * kRangeBits)) + 1;
  claim_.store(job << (2 * kRangeBits) | static_cast<uint64_t>(ranges) << kRangeBits);
  epoch_.fetch_add(1);
  if (num_sleeping_.load() > 0) epoch_.notify_all();

  work_on_current_job();
  for (int spins = 0; num_done_.load(std::memory_order_acquire) < ranges; ++spins) {
    spins < kSpinsBeforeYield ? pause() : std::this_thread::yield();
  }
}

void ThreadPool::start_workers(size_t count) {
  if (workers_.size() >= count) return;
  workers_.reserve(count);
  try {
    while (workers_.size() < count) workers_.emplace_back(&ThreadPool::work_until_stopped, this);
  } catch (const std::system_error&) {
    // No more threads to be had: those there are do the work.
  }
}

void ThreadPool::work_until_stopped() {
  while (!is_stopping_.load(std::memory_order_relaxed)) {
    const uint64_t seen = claim_.load(std::memory_order_acquire);
    work_on_current_job();
    wait_for_work(seen);
  }
}

void ThreadPool::work_on_current_job() {
  uint64_t claim = claim_.load(std::memory_order_acquire);
  while (true) {
    const uint64_t next = claim & kRangeMask;
    const uint64_t ranges = claim >> kRangeBits & kRangeMask;
    if (next >= ranges) return;
    if (!claim_.compare_exchange_weak(claim, claim + 1, std::memory_order_acq_rel)) continue;
    // The job cannot end, and so not change, before this range is counted as done.
    set_float_control(float_control_);
    run_range(static_cast<int64_t>(next));
    num_done_.fetch_add(1, std::memory_order_release);
    claim = claim_.load(std::memory_order_acquire);
  }
}

void ThreadPool::run_range(int64_t range) const {
  (*body_)(range* size_ / num_ranges_, (range + 1) * size_ / num_ranges_);
}

void ThreadPool::wait_for_work(uint64_t seen) {
  const auto has_news = [&] {
    const uint64_t now = claim_.load(std::memory_order_acquire);
    return now >> (2 * kRangeBits) != seen >> (2 * kRangeBits) || is_stopping_.load();
  };
  const auto deadline = std::chrono::steady_clock::now() + kSpinTime;
  do {
    for (int i = 0; i < 32; ++i) {
      if (has_news()) return;
      pause();
    }
  } while (std::chrono::steady_clock::now() < deadline);
  // Announce the sleep, then look once more: run() publishes first and counts sleepers afterwards.
  const uint32_t epoch = epoch_.load();
  num_sleeping_.fetch_add(1);
  if (!has_news()) epoch_.wait(epoch);
  num_sleeping_.fetch_sub(1);
}

}  // namespace skv
