// A read-only view of a caller's int32 or int64 tokens: two words and a flag, no copy. The memory
// must outlive the view. Values are not trusted: int64 input may hold anything, so whoever stores
// tokens asks first_invalid() before changing any state.
#pragma once

#include <cstdint>
#include <span>

#include "csrc/core/ids.h"

namespace skv {

class TokenSpan {
 public:
  TokenSpan() = default;
  TokenSpan(std::span<const int32_t> tokens)  // NOLINT(google-explicit-constructor): a view
      : data_(tokens.data()), size_(static_cast<int64_t>(tokens.size())), is_wide_(false) {}
  TokenSpan(std::span<const int64_t> tokens)  // NOLINT(google-explicit-constructor): a view
      : data_(tokens.data()), size_(static_cast<int64_t>(tokens.size())), is_wide_(true) {}

  int64_t size() const { return size_; }
  bool empty() const { return size_ == 0; }
  int64_t operator[](int64_t i) const {
    return is_wide_ ? static_cast<const int64_t*>(data_)[i] : static_cast<const int32_t*>(data_)[i];
  }

  // Position of the first value that is no token id (negative or above int32), or -1. O(size).
  int64_t first_invalid() const;

  // Throws std::invalid_argument naming `what` when first_invalid() finds one.
  void require_valid(const char* what) const;

  // Length of the longest common run of tokens[begin, ...) and other[0, other_size). O(run).
  int64_t common_prefix(int64_t begin, const TokenId* other, int64_t other_size) const;

  // Writes tokens[begin, end) to `out`. The values must be valid token ids.
  void copy_to(int64_t begin, int64_t end, TokenId* out) const;

 private:
  const void* data_ = nullptr;
  int64_t size_ = 0;
  bool is_wide_ = false;
};

}  // namespace skv
