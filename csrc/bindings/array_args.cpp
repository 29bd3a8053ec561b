#include "csrc/bindings/array_args.h"

#include <algorithm>
#include <string_view>

#include "csrc/bindings/checks.h"

namespace py = pybind11;

namespace skv::bindings {

IntArray::IntArray(py::handle object, const char* name) : name_(name) {
  if (THPVariable_Check(object.ptr())) {
    view_tensor(THPVariable_Unpack(object.ptr()));
  } else if (PyObject_CheckBuffer(object.ptr()) != 0) {
    view_buffer(object);
  } else {
    fail(Py_TYPE(object.ptr())->tp_name);
  }
}

IntArray::~IntArray() {
  if (has_buffer_) PyBuffer_Release(&buffer_);
}

void IntArray::view_tensor(const at::Tensor& tensor) {
  // Fake and other wrapper tensors have no memory of their own to read.
  if (tensor.layout() != at::kStrided || tensor.unsafeGetTensorImpl()->is_python_dispatch()) {
    fail("a tensor that is not dense memory");
  }
  if (!tensor.device().is_cpu()) fail("a tensor on " + tensor.device().str());
  const at::ScalarType dtype = tensor.scalar_type();
  if (dtype != at::kInt && dtype != at::kLong) fail(describe(tensor));
  if (tensor.dim() != 1) fail(describe(tensor));
  if (!tensor.is_contiguous()) {
    fail(describe(tensor) + " with stride " + std::to_string(tensor.stride(0)));
  }
  data_ = tensor.const_data_ptr();
  size_ = tensor.numel();
  is_wide_ = dtype == at::kLong;
}

void IntArray::view_buffer(py::handle object) {
  if (PyObject_GetBuffer(object.ptr(), &buffer_, PyBUF_STRIDES | PyBUF_FORMAT) != 0) {
    throw py::error_already_set();
  }
  has_buffer_ = true;
  std::string_view format = buffer_.format != nullptr ? buffer_.format : "B";
  const std::string got = std::string(Py_TYPE(object.ptr())->tp_name) + " of format '" +
                          std::string(format) + "' with " + std::to_string(buffer_.ndim) +
                          " dimensions";
  // Native signed integers only: 'i', and 'l' or 'q' by their size. '=' and '@' say native too.
  if (format.starts_with('=') || format.starts_with('@')) format.remove_prefix(1);
  const bool is_signed = format == "i" || format == "l" || format == "q";
  if (!is_signed || (buffer_.itemsize != 4 && buffer_.itemsize != 8)) fail(got);
  if (buffer_.ndim != 1) fail(got);
  size_ = buffer_.shape[0];
  if (size_ > 1 && buffer_.strides[0] != buffer_.itemsize) {
    fail(got + " and a stride of " + std::to_string(buffer_.strides[0]) + " bytes");
  }
  if (reinterpret_cast<uintptr_t>(buffer_.buf) % static_cast<size_t>(buffer_.itemsize) != 0) {
    fail(got + " that is not aligned");
  }
  data_ = buffer_.buf;
  is_wide_ = buffer_.itemsize == 8;
}

void IntArray::fail(const std::string& got, const char* expected) const {
  throw py::type_error(std::string(name_) + ": expected a contiguous " + expected +
                       " array of one dimension on the CPU, got " + got);
}

TokenSpan IntArray::tokens() const {
  if (is_wide_) return int64();
  return int32();
}

std::span<const int32_t> IntArray::int32() const {
  if (is_wide_) fail("int64", "int32");
  return {static_cast<const int32_t*>(data_), static_cast<size_t>(size_)};
}

std::span<const int64_t> IntArray::int64() const {
  if (!is_wide_) fail("int32", "int64");
  return {static_cast<const int64_t*>(data_), static_cast<size_t>(size_)};
}

at::Tensor to_tensor(std::span<const int32_t> values) {
  at::Tensor tensor = empty_int_tensor<int32_t>({static_cast<int64_t>(values.size())});
  std::copy(values.begin(), values.end(), tensor.mutable_data_ptr<int32_t>());
  return tensor;
}

}  // namespace skv::bindings
