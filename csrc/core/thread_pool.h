// The threads that run kernels on the CPU: one pool for the process, made when first needed.
//
// A job is cut into as many ranges as threads are asked for. Every thread, the caller too, claims
// the next range until none is left; the caller then waits only for ranges that somebody else has
// begun. So a worker that the system does not schedule (a busy machine, fewer cores than threads)
// costs nothing: the caller does its ranges too. A fork-join runtime would wait for it at the end
// of each of some hundred kernels of a step.
//
// An idle worker spins for a moment, since the next kernel usually follows within microseconds,
// and then sleeps. Workers run with the caller's floating-point control word, so rounding and
// denormals are the same on every thread (x86-64 and AArch64; elsewhere workers keep the default).
// After fork() the child makes a pool of its own.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "csrc/core/parallel_for.h"

namespace skv {

class ThreadPool {
 public:
  // The pool of this process; never destroyed, since threads may use it until the end.
  static ThreadPool& instance();

  ThreadPool() = default;
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;
  // Ends the workers; no run() may be under way.
  ~ThreadPool();

  // Runs body on disjoint ranges that cover [0, n), on at most num_threads threads, each range at
  // least `grain` long (but for one). Returns when all are done. body must not throw. A call
  // while a job runs, from inside its body or from another thread, does all the work in the calling
  // thread.
  void run(int64_t n, int64_t grain, int num_threads, RangeBody body);

  // Workers that were started so far.
  int num_workers() const { return static_cast<int>(workers_.size()); }

 private:
  // Which range is next, in one word so that a claim is one compare-and-swap: a late worker can
  // never take a range of a job it does not know. [job: 32][ranges: 16][next: 16]
  static constexpr int kRangeBits = 16;
  static constexpr uint64_t kRangeMask = (1u << kRangeBits) - 1;

  void start_workers(size_t count);
  void work_until_stopped();
  // Claims and runs ranges until none is left.
  void work_on_current_job();
  void run_range(int64_t range) const;
  void wait_for_work(uint64_t seen);

  // Set while a job runs. Not a mutex: a nested call asks in the thread that set it, which a mutex
  // does not allow.
  std::atomic<bool> has_job_{false};
  std::atomic<uint64_t> claim_{0};
  std::atomic<int64_t> num_done_{0};
  std::atomic<uint32_t> epoch_{0};  // what sleeping workers wait on
  std::atomic<int> num_sleeping_{0};
  std::atomic<bool> is_stopping_{false};

  // The job; written before claim_ is published, read after a claim.
  const RangeBody* body_ = nullptr;
  int64_t size_ = 0;
  int64_t num_ranges_ = 0;
  uint32_t float_control_ = 0;

  std::vector<std::thread> workers_;
};

}  // namespace skv
