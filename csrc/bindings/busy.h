// One owner at a time. The state objects have no locks; since long calls release the GIL, each has
// a flag, and a second entry raises instead of racing. What touches the pool takes its flag too.
#pragma once

#include <pybind11/pybind11.h>

#include <atomic>
#include <stdexcept>
#include <string>
#include <thread>

namespace skv::bindings {

class BusyFlag {
 public:
  explicit BusyFlag(const char* name) : name_(name) {}

  void enter() {
    if (is_busy_.exchange(true, std::memory_order_acquire)) {
      throw std::runtime_error(std::string(name_) + " is busy: another thread is inside a call");
    }
  }
  void leave() { is_busy_.store(false, std::memory_order_release); }

  // For destructors, which cannot raise. Called and left with the GIL held, so that nobody can
  // enter between the return and the destruction.
  void wait_until_idle() const {
    while (is_busy_.load(std::memory_order_acquire)) {
      pybind11::gil_scoped_release release;
      std::this_thread::yield();
    }
  }

 private:
  const char* name_;
  std::atomic<bool> is_busy_{false};
};

// Holds one or two flags for the length of a call.
class Entry {
 public:
  explicit Entry(BusyFlag& flag) : first_(flag) { first_.enter(); }
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
