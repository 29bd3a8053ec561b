// In which order the threads that can run do so. Results must not depend on it: a missing barrier
// shows as bits that change with the order.
#pragma once

#include <cstdint>
#include <span>

namespace skv::emulation {

// SKV_EMULATION_ORDER: forward (default), reversed, or a number that seeds a random order.
// SKV_EMULATION_COPIES: late (default) or early, see copy_async.
struct Options {
  enum class Order { kForward, kReversed, kRandom };
  Order order = Order::kForward;
  uint64_t seed = 0;
  bool copies_early = false;
};

// Read once; an unknown value ends the process with a message.
const Options& options();

// Writes 0, 1, ... in the order of the next round.
class RoundOrder {
 public:
  explicit RoundOrder(uint64_t block) : state_(options().seed * 0x9E3779B97F4A7C15u + block + 1) {}
  void arrange(std::span<int> numbers);

 private:
  uint64_t state_;
};

}  // namespace skv::emulation
