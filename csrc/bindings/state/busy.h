// One owner at a time. The state objects have no locks; since long calls release the GIL, each has
// a flag, and a second entry raises StateBusyError instead of racing. What touches the pool takes
// its flag too.
//
// fork() copies the flags of calls that other threads are inside, and those threads do not exist in
// the child: nobody would ever leave. So a flag knows the process that set it. What was only being
// read at the fork is free in the child. What was being changed is broken there, half old and half
// new: entering raises, and destroying it neither waits nor follows its pointers.
#pragma once

#include <pybind11/pybind11.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <stdexcept>
#include <thread>

namespace skv::bindings {

// In Python stateful_kv.errors.StateBusyError, a RuntimeError.
class StateBusyError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

enum class Access : uint8_t { kRead, kChange };

class BusyFlag {
 public:
  explicit BusyFlag(const char* name) : name_(name) {}

  // Lets the flags of this process tell forked children apart; called once, at import.
  static void watch_forks();

  void enter(Access access = Access::kChange);
  void leave() { holder_.store(0, std::memory_order_release); }

  // For destructors, which cannot raise. Called and left with the GIL held, so that nobody can
  // enter between the return and the destruction. Ends without success while Python ends: a thread
  // that then wants the GIL back never gets it, so it would never leave.
  void wait_until_idle() const {
    while (is_held_here() && !is_python_ending()) {
      pybind11::gil_scoped_release release;
      std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
  }

  // Whether a call that changes the object is under way or was cut off by a fork.
  bool is_being_changed() const { return is_change(holder_.load(std::memory_order_acquire)); }

 private:
  static bool is_change(uint64_t holder) { return (holder & 1) != 0; }
  static bool is_python_ending() {
#if PY_VERSION_HEX >= 0x030D0000
    return Py_IsFinalizing() != 0;
#else
    return _Py_IsFinalizing() != 0;
#endif
  }
  static uint64_t this_process() { return process_.load(std::memory_order_relaxed); }
  bool is_held_here() const {
    const uint64_t holder = holder_.load(std::memory_order_acquire);
    return holder != 0 && holder >> 1 == this_process();
  }

  // Forks between the first process and this one, counted from 1. Unlike a process id it costs no
  // system call and never repeats.
  static std::atomic<uint64_t> process_;

  const char* name_;
  std::atomic<uint64_t> holder_{0};  // 0 = free, else [process: 63][is_change: 1]
};

// Holds one or two flags for the length of a call.
class Entry {
 public:
  explicit Entry(BusyFlag& flag, Access access = Access::kChange) : first_(flag) {
    first_.enter(access);
  }
  Entry(BusyFlag& flag, BusyFlag& pool_flag) : first_(flag), second_(&pool_flag) {
    first_.enter();
    try {
      second_->enter();
    } catch (...) {
      first_.leave();
      throw;
    }
  }
  ~Entry() {
    if (second_ != nullptr) second_->leave();
    first_.leave();
  }
  Entry(const Entry&) = delete;
  Entry& operator=(const Entry&) = delete;

 private:
  BusyFlag& first_;
  BusyFlag* second_ = nullptr;
};

// Runs `work` without the GIL if it is long: releasing costs little, but taking the GIL back may
// mean waiting for a whole switch interval (5 ms) of another thread.
template <typename Work>
auto run_work(bool is_long, Work work) {
  if (!is_long) return work();
  pybind11::gil_scoped_release release;
  return work();
}

}  // namespace skv::bindings
