#include "tests/emulation/runtime/order.h"

#include <cstdio>
#include <cstdlib>
#include <string>
#include <utility>

namespace skv::emulation {

namespace {

[[noreturn]] void refuse(const char* variable, const std::string& value, const char* expected) {
  std::fprintf(stderr, "%s: expected %s, got '%s'\n", variable, expected, value.c_str());
  std::abort();
}

std::string variable(const char* name, const char* fallback) {
  const char* value = std::getenv(name);
  return value != nullptr && *value != '\0' ? value : fallback;
}

Options read_options() {
  Options result;
  const std::string order = variable("SKV_EMULATION_ORDER", "forward");
  if (order == "reversed") {
    result.order = Options::Order::kReversed;
  } else if (order != "forward") {
    char* end = nullptr;
    result.order = Options::Order::kRandom;
    result.seed = std::strtoull(order.c_str(), &end, 10);
    if (*end != '\0') refuse("SKV_EMULATION_ORDER", order, "forward, reversed or a number");
  }
  const std::string copies = variable("SKV_EMULATION_COPIES", "late");
  if (copies != "late" && copies != "early") {
    refuse("SKV_EMULATION_COPIES", copies, "late or early");
  }
  result.copies_early = copies == "early";
  return result;
}

}  // namespace

const Options& options() {
  static const Options result = read_options();
  return result;
}

void RoundOrder::arrange(std::span<int> numbers) {
  const int count = static_cast<int>(numbers.size());
  const bool is_reversed = options().order == Options::Order::kReversed;
  for (int i = 0; i < count; ++i) {
    numbers[static_cast<size_t>(i)] = is_reversed ? count - 1 - i : i;
  }
  if (options().order != Options::Order::kRandom) return;
  for (size_t i = numbers.size(); i > 1; --i) {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    std::swap(numbers[i - 1], numbers[state_ % i]);
  }
}

}  // namespace skv::emulation
