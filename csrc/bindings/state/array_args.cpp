#include "csrc/bindings/state/array_args.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <string_view>

#include "csrc/ops/checks.h"

namespace py = pybind11;

namespace skv::bindings {
namespace {

// Whether something lies between the tensor and its memory: it is sparse, nested, a view that is
// negated when read, a constant without memory or a wrapper of one of torch's transforms.
bool has_indirection(const at::Tensor& tensor) {
  constexpr c10::DispatchKeySet kPlain{c10::DispatchKey::CPU, c10::DispatchKey::ADInplaceOrView,
                                       c10::DispatchKey::AutogradCPU,
                                       c10::DispatchKey::AutocastCPU};
  return (tensor.key_set().raw_repr() & ~kPlain.raw_repr()) != 0;
}

bool has_memory(const at::Tensor& tensor) {
  if (!tensor.has_storage()) return false;
  // A storage can be made smaller than its tensors say.
  const auto num_bytes = static_cast<int64_t>(tensor.storage().nbytes());
  const int64_t num_elements = tensor.storage_offset() + tensor.numel();
  return num_elements <= num_bytes / static_cast<int64_t>(tensor.itemsize()) &&
         (tensor.numel() == 0 || tensor.const_data_ptr() != nullptr);
}

// Native signed integers only: 'i', and 'l' or 'q' by their size. '=', '@' and the sign of the own
// byte order say native too.
bool is_native_int(std::string_view format) {
  constexpr char kOwnOrder = std::endian::native == std::endian::little ? '<' : '>';
  if (!format.empty() && (format[0] == '=' || format[0] == '@' || format[0] == kOwnOrder)) {
    format.remove_prefix(1);
  }
  return format == "i" || format == "l" || format == "q";
}

}  // namespace

bool BufferView::acquire(py::handle object) {
  is_held_ = PyObject_GetBuffer(object.ptr(), &buffer_, PyBUF_STRIDES | PyBUF_FORMAT) == 0;
  return is_held_;
}

void BufferView::release() {
  if (is_held_) PyBuffer_Release(&buffer_);
  is_held_ = false;
}

IntArray::IntArray(py::handle object, const char* name, Reading reading) : name_(name) {
  if (THPVariable_Check(object.ptr())) {
    view_tensor(THPVariable_Unpack(object.ptr()));
  } else if (PyObject_CheckBuffer(object.ptr()) != 0) {
    view_buffer(object);
  } else {
    fail(Py_TYPE(object.ptr())->tp_name);
  }
  if (reading == Reading::kCopy) copy();
}

void IntArray::view_tensor(const at::Tensor& tensor) {
  // Asked first, because such a tensor answers the other questions by calling Python.
  if (tensor.unsafeGetTensorImpl()->is_python_dispatch()) fail("a tensor that is not dense memory");
  if (!tensor.device().is_cpu()) fail("a tensor on " + tensor.device().str());
  if (tensor.is_neg()) fail("a negative view (resolve_neg() makes it an array)");
  if (has_indirection(tensor)) fail("a tensor that is not dense memory");
  const at::ScalarType dtype = tensor.scalar_type();
  if (dtype != at::kInt && dtype != at::kLong) fail(ops::describe(tensor));
  if (tensor.dim() != 1) fail(ops::describe(tensor));
  if (!tensor.is_contiguous()) {
    fail(ops::describe(tensor) + " with stride " + std::to_string(tensor.stride(0)));
  }
  if (!has_memory(tensor)) fail(ops::describe(tensor) + " without memory");
  storage_ = tensor.storage();
  data_ = tensor.const_data_ptr();
  size_ = tensor.numel();
  is_wide_ = dtype == at::kLong;
}

void IntArray::view_buffer(py::handle object) {
  if (!buffer_.acquire(object)) {
    if (PyErr_ExceptionMatches(PyExc_BufferError) == 0) throw py::error_already_set();
    const py::error_already_set error;  // takes the error over
    fail(std::string(Py_TYPE(object.ptr())->tp_name) +
         " whose buffer cannot be read: " + py::str(error.value()).cast<std::string>());
  }
  const std::string_view format = buffer_->format != nullptr ? buffer_->format : "B";
  const std::string got = std::string(Py_TYPE(object.ptr())->tp_name) + " of format '" +
                          std::string(format) + "' with " + std::to_string(buffer_->ndim) +
                          " dimensions";
  const auto item_size = buffer_->itemsize;
  if (!is_native_int(format) || (item_size != 4 && item_size != 8)) fail(got);
  if (buffer_->ndim != 1) fail(got);
  // Some exporters (ctypes) leave the strides out although they are asked for: contiguous then.
  size_ = buffer_->shape != nullptr ? buffer_->shape[0] : buffer_->len / item_size;
  if (size_ > 1 && buffer_->strides != nullptr && buffer_->strides[0] != item_size) {
    fail(got + " and a stride of " + std::to_string(buffer_->strides[0]) + " bytes");
  }
  const auto address = reinterpret_cast<uintptr_t>(buffer_->buf);
  if (size_ > 0 && address % static_cast<size_t>(item_size) != 0) {  // empty ones lie anywhere
    fail(got + " that is not aligned");
  }
  data_ = buffer_->buf;
  is_wide_ = item_size == 8;
}

void IntArray::copy() {
  const size_t num_bytes = static_cast<size_t>(size_) * (is_wide_ ? 8 : 4);
  std::byte* target = few_.data();
  if (num_bytes > few_.size()) {
    many_ = std::make_unique_for_overwrite<std::byte[]>(num_bytes);
    target = many_.get();
  }
  if (num_bytes > 0) std::memcpy(target, data_, num_bytes);
  data_ = target;
  buffer_.release();
  storage_ = {};
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
