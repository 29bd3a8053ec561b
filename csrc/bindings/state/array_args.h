// Integer arrays that cross the Python border, in and out.
//
// In: a torch tensor, a numpy array or any object with the buffer protocol; one dimension,
// contiguous, aligned, on the CPU, native int32 or int64. Anything else is a TypeError that says
// what was expected and what came: nothing is converted in silence.
// Out: fresh torch tensors.
//
// The values are copied before they are checked: other threads may write into the caller's array
// at any time (torch's own operations release the GIL), so what was checked there may have changed
// when it is used. Long token lists that are only compared are read in place.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <span>
#include <string>

#include "csrc/core/token_span.h"

namespace skv::bindings {

// Gives the buffer back at the end of its life, also where it turned out to be of no use.
class BufferView {
 public:
  BufferView() = default;
  BufferView(const BufferView&) = delete;
  BufferView& operator=(const BufferView&) = delete;
  ~BufferView() { release(); }

  // False, with the Python error set, if the object refuses.
  bool acquire(pybind11::handle object);
  void release();
  const Py_buffer& operator*() const { return buffer_; }
  const Py_buffer* operator->() const { return &buffer_; }

 private:
  Py_buffer buffer_{};
  bool is_held_ = false;
};

class IntArray {
 public:
  enum class Reading : uint8_t {
    kCopy,
    // The argument's memory is kept alive, but its values may change at any time: for readers that
    // only compare them.
    kInPlace,
  };

  // `name` stands first in messages: "RadixTree.match: tokens".
  IntArray(pybind11::handle object, const char* name, Reading reading = Reading::kCopy);
  IntArray(const IntArray&) = delete;
  IntArray& operator=(const IntArray&) = delete;

  int64_t size() const { return size_; }
  // Either dtype.
  TokenSpan tokens() const;
  // One dtype only; the other one is a TypeError.
  std::span<const int32_t> int32() const;
  std::span<const int64_t> int64() const;

 private:
  static constexpr size_t kFewBytes = 128;  // 16 sequence ids: copied without an allocation

  void view_tensor(const at::Tensor& tensor);
  void view_buffer(pybind11::handle object);
  void copy();
  [[noreturn]] void fail(const std::string& got, const char* expected = "int32 or int64") const;

  const char* name_;
  const void* data_ = nullptr;
  int64_t size_ = 0;
  bool is_wide_ = false;
  BufferView buffer_;     // of a buffer that is read in place
  c10::Storage storage_;  // of a tensor that is read in place
  alignas(int64_t) std::array<std::byte, kFewBytes> few_;
  std::unique_ptr<std::byte[]> many_;
};

// Made without torch's dispatcher: neither a fake tensor mode nor a transform of the caller may put
// something without memory in its place.
template <typename Element>
at::Tensor empty_int_tensor(std::initializer_list<int64_t> sizes) {
  return at::Tensor(
      at::detail::empty_cpu(at::IntArrayRef(sizes), at::CppTypeToScalarType<Element>::value));
}

// A copy as int32[n].
at::Tensor to_tensor(std::span<const int32_t> values);

}  // namespace skv::bindings
