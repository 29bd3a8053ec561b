// Checks of our own invariants. A failed check throws InvariantError: it is a defect of this
// library and never the answer to bad input (that is std::invalid_argument / std::out_of_range).
#pragma once

#include <stdexcept>
#include <string>

namespace skv {

class InvariantError : public std::logic_error {
 public:
  using std::logic_error::logic_error;
};

namespace internal {

[[noreturn]] inline void fail_invariant(const char* condition, const char* file, int line,
                                        const char* message) {
  throw InvariantError(std::string(file) + ":" + std::to_string(line) + ": broken invariant (" +
                       condition + "): " + message);
}

}  // namespace internal
}  // namespace skv

// Kept in every build: meant for cold paths.
#define SKV_ASSERT(condition, message)                                          \
  do {                                                                          \
    if (!(condition)) [[unlikely]] {                                            \
      ::skv::internal::fail_invariant(#condition, __FILE__, __LINE__, message); \
    }                                                                           \
  } while (false)

// Compiled out with NDEBUG: meant for hot loops. The condition is still parsed, so that it cannot
// rot in release builds.
#ifdef NDEBUG
#define SKV_DEBUG_ASSERT(condition, message) \
  do {                                       \
    if (false) {                             \
      SKV_ASSERT(condition, message);        \
    }                                        \
  } while (false)
#else
#define SKV_DEBUG_ASSERT(condition, message) SKV_ASSERT(condition, message)
#endif
