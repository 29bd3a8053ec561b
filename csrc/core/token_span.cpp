#include "csrc/core/token_span.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

namespace skv {
namespace {

constexpr int64_t kMaxToken = std::numeric_limits<TokenId>::max();  // 2^31 - 1

// Tokens compared at once: long enough to run at memory speed, short enough that the scan for the
// exact position of a difference costs nothing.
constexpr int64_t kBlock = 64;

bool block_equal(const int32_t* a, const TokenId* b) {
  return std::memcmp(a, b, kBlock * sizeof(TokenId)) == 0;
}

bool block_equal(const int64_t* a, const TokenId* b) {
  uint64_t difference = 0;  // no early exit: the loop becomes vector code
  for (int64_t i = 0; i < kBlock; ++i) {
    difference |= static_cast<uint64_t>(a[i]) ^ static_cast<uint64_t>(int64_t{b[i]});
  }
  return difference == 0;
}

template <typename Token>
int64_t common_run(const Token* a, const TokenId* b, int64_t size) {
  int64_t i = 0;
  while (i + kBlock <= size && block_equal(a + i, b + i)) i += kBlock;
  while (i < size && a[i] == b[i]) ++i;
  return i;
}

// No early exit: input is valid nearly always, and then this is one pass of vector code.
template <typename Token>
bool all_valid(const Token* tokens, int64_t size) {
  uint64_t bits = 0;
  for (int64_t i = 0; i < size; ++i) bits |= static_cast<uint64_t>(int64_t{tokens[i]});
  return (bits >> 31) == 0;
}

}  // namespace

int64_t TokenSpan::first_invalid() const {
  const bool is_valid = is_wide_ ? all_valid(static_cast<const int64_t*>(data_), size_)
                                 : all_valid(static_cast<const int32_t*>(data_), size_);
  if (is_valid) return -1;
  int64_t i = 0;
  while ((*this)[i] >= 0 && (*this)[i] <= kMaxToken) ++i;
  return i;
}

void TokenSpan::require_valid(const char* what) const {
  const int64_t i = first_invalid();
  if (i < 0) return;
  throw std::invalid_argument(std::string(what) + ": token " + std::to_string((*this)[i]) +
                              " at position " + std::to_string(i) + " is not in [0, 2^31)");
}

int64_t TokenSpan::common_prefix(int64_t begin, const TokenId* other, int64_t other_size) const {
  const int64_t size = std::min(size_ - begin, other_size);
  return is_wide_ ? common_run(static_cast<const int64_t*>(data_) + begin, other, size)
                  : common_run(static_cast<const int32_t*>(data_) + begin, other, size);
}

void TokenSpan::copy_to(int64_t begin, int64_t end, TokenId* out) const {
  if (is_wide_) {
    const auto* tokens = static_cast<const int64_t*>(data_);
    for (int64_t i = begin; i < end; ++i) *out++ = static_cast<TokenId>(tokens[i]);
  } else {
    const auto* tokens = static_cast<const int32_t*>(data_);
    std::copy(tokens + begin, tokens + end, out);
  }
}

}  // namespace skv
