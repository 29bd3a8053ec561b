// Integer arrays that cross the Python border, in and out.
//
// In: a torch tensor, a numpy array or any object with the buffer protocol is read in place; one
// dimension, contiguous, aligned, on the CPU, native int32 or int64. Anything else is a TypeError
// that says what was expected and what came: nothing is converted in silence.
// Out: fresh torch tensors.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <cstdint>
#include <initializer_list>
#include <span>
#include <string>

#include "csrc/core/token_span.h"

namespace skv::bindings {

// Keeps the buffer of the argument alive and readable for its own lifetime.
class IntArray {
 public:
  // `name` stands first in messages: "RadixTree.match: tokens".
  IntArray(pybind11::handle object, const char* name);
  ~IntArray();
  IntArray(const IntArray&) = delete;
  IntArray& operator=(const IntArray&) = delete;

  int64_t size() const { return size_; }
  // Either dtype.
  TokenSpan tokens() const;
  // One dtype only; the other one is a TypeError.
  std::span<const int32_t> int32() const;
  std::span<const int64_t> int64() const;

 private:
  void view_tensor(const at::Tensor& tensor);
  void view_buffer(pybind11::handle object);
  [[noreturn]] void fail(const std::string& got, const char* expected = "int32 or int64") const;

  const char* name_;
  const void* data_ = nullptr;
  int64_t size_ = 0;
  bool is_wide_ = false;
  Py_buffer buffer_{};
  bool has_buffer_ = false;
};

template <typename Element>
at::Tensor empty_int_tensor(std::initializer_list<int64_t> sizes) {
  return at::empty(at::IntArrayRef(sizes), at::CppTypeToScalarType<Element>::value);
}

// A copy as int32[n].
at::Tensor to_tensor(std::span<const int32_t> values);

}  // namespace skv::bindings
