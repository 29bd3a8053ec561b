// Integer helpers that never narrow or wrap in silence.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

namespace skv {

// Narrows `value`; throws std::out_of_range naming `what` when it does not fit.
template <typename To>
To checked_cast(int64_t value, const char* what) {
  if (!std::in_range<To>(value)) {
    throw std::out_of_range(std::string(what) + ": " + std::to_string(value) + " does not fit");
  }
  return static_cast<To>(value);
}

// ceil(value / divisor) for value >= 0, divisor > 0; cannot overflow.
constexpr int64_t ceil_div(int64_t value, int64_t divisor) {
  return value / divisor + (value % divisor != 0 ? 1 : 0);
}

}  // namespace skv
