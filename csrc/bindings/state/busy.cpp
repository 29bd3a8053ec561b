#include "csrc/bindings/state/busy.h"

#include <pthread.h>

#include <string>

namespace skv::bindings {

std::atomic<uint64_t> BusyFlag::process_{1};

void BusyFlag::watch_forks() {
  static const int error =
      pthread_atfork(nullptr, nullptr, [] { process_.fetch_add(1, std::memory_order_relaxed); });
  if (error != 0) throw std::runtime_error("pthread_atfork failed");
}

void BusyFlag::enter(Access access) {
  const uint64_t here = this_process();
  const uint64_t mine = here << 1 | (access == Access::kChange ? 1U : 0U);
  uint64_t holder = 0;
  if (holder_.compare_exchange_strong(holder, mine, std::memory_order_acquire)) return;
  if (holder >> 1 == here) {
    throw StateBusyError(std::string(name_) + " is busy: another thread is inside a call");
  }
  if (is_change(holder)) {
    throw StateBusyError(std::string(name_) +
                         " is broken: another thread was changing it when this process was forked");
  }
  if (!holder_.compare_exchange_strong(holder, mine, std::memory_order_acquire)) {
    throw StateBusyError(std::string(name_) + " is busy: another thread is inside a call");
  }
}

}  // namespace skv::bindings
