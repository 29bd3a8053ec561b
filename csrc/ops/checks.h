// Argument checks of the ops. Every message reads "op: argument: expected ..., got ...".
//
//   const OpCheck check{"append_kv", k_pool.device()};
//   check("slots", slots).dtype({at::kLong}).shape({{"N", num_rows}}).contiguous();
//
// A wrong dtype is a TypeError, everything else a ValueError.
//
// Checks of dtypes, shapes and strides hold for real tensors and while torch.compile or
// torch.export trace an op alike: sizes are c10::SymInt, which may be unknown then, and a
// comparison becomes a condition of the traced program. What looks at memory is skipped for tensors
// without any (the Meta kernels, ops/*/meta.cpp).
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/GradMode.h>
#include <c10/core/SymInt.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <sstream>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

namespace skv::ops {

using OptionalTensor = std::optional<at::Tensor>;
using DtypeList = std::initializer_list<at::ScalarType>;
inline constexpr DtypeList kFloatDtypes{at::kFloat, at::kHalf, at::kBFloat16};
inline constexpr DtypeList kKvDtypes{at::kFloat, at::kHalf, at::kBFloat16, at::kChar};
inline constexpr DtypeList kIdDtypes{at::kInt, at::kLong};

// One dimension of an expected shape: its symbol, and its size unless any will do.
struct Dim {
  const char* symbol;
  std::optional<c10::SymInt> size = std::nullopt;
};

inline std::string dtype_name(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return "float32";
    case at::kDouble:
      return "float64";
    case at::kHalf:
      return "float16";
    case at::kBFloat16:
      return "bfloat16";
    case at::kChar:
      return "int8";
    case at::kByte:
      return "uint8";
    case at::kShort:
      return "int16";
    case at::kInt:
      return "int32";
    case at::kLong:
      return "int64";
    case at::kBool:
      return "bool";
    default:
      return at::toString(dtype);
  }
}

inline std::string to_text(const c10::SymInt& number) {
  std::ostringstream text;
  text << number;
  return text.str();
}

// A condition on sizes. One that depends on data which is not there yet (the rows of x[mask], while
// it is traced) becomes a check of the traced program; it does not end the tracing.
inline bool holds(const c10::SymBool& condition) {
  return condition.expect_true(__FILE__, __LINE__);
}

// A size that is the same in every call, for tracing too: of a weight.
inline int64_t fixed_size(const at::Tensor& tensor, int64_t axis) {
  return tensor.sym_size(axis).guard_int(__FILE__, __LINE__);
}

// "float32[3, 4]"
inline std::string describe(const at::Tensor& tensor) {
  std::ostringstream text;
  text << dtype_name(tensor.scalar_type()) << tensor.sym_sizes();
  return text.str();
}

// The checks of one tensor argument; each returns the object, so that they chain.
class ArgumentCheck {
 public:
  ArgumentCheck(const char* op, const char* name, const at::Tensor& tensor)
      : op_(op), name_(name), tensor_(tensor) {}

  const ArgumentCheck& dtype(DtypeList allowed) const {
    for (at::ScalarType candidate : allowed) {
      if (tensor_.scalar_type() == candidate) return *this;
    }
    std::string names;
    for (const at::ScalarType& candidate : allowed) {
      if (std::find(allowed.begin(), &candidate, candidate) != &candidate) continue;  // repeated
      names += (names.empty() ? "" : " or ") + dtype_name(candidate);
    }
    TORCH_CHECK_TYPE(false, op_, ": ", name_, ": expected dtype ", names, ", got ",
                     describe(tensor_));
  }

  const ArgumentCheck& shape(std::initializer_list<Dim> dims) const {
    bool is_equal = tensor_.dim() == static_cast<int64_t>(dims.size());
    int64_t axis = 0;
    for (const Dim& dim : dims) {
      if (!is_equal) break;
      is_equal = !dim.size.has_value() || tensor_.sym_size(axis) == *dim.size;
      ++axis;
    }
    if (!is_equal) {
      TORCH_CHECK_VALUE(false, op_, ": ", name_, ": expected shape ", describe_shape(dims),
                        ", got ", describe(tensor_));
    }
    return *this;
  }

  const ArgumentCheck& contiguous() const {
    TORCH_CHECK_VALUE(tensor_.is_contiguous(), op_, ": ", name_,
                      ": expected a contiguous tensor, got ", describe(tensor_), " with strides ",
                      tensor_.sym_strides());
    return *this;
  }

  const ArgumentCheck& last_dim_contiguous() const {
    TORCH_CHECK_VALUE(
        tensor_.dim() > 0 && (tensor_.sym_stride(-1) == 1 || tensor_.sym_size(-1) <= 1), op_, ": ",
        name_, ": expected a contiguous last dimension, got ", describe(tensor_), " with strides ",
        tensor_.sym_strides());
    return *this;
  }

  // The tensor will be written: no two of its elements may share memory. Sorted by stride, each
  // dimension has to step over all that the smaller ones reach; layouts that interleave in a way
  // that needs more thought than that are refused too.
  const ArgumentCheck& writable() const {
    if (tensor_.is_contiguous_or_false()) return *this;
    std::vector<std::pair<c10::SymInt, c10::SymInt>> dims;  // stride, size
    for (int64_t axis = 0; axis < tensor_.dim(); ++axis) {
      if (TORCH_GUARD_OR_TRUE(tensor_.sym_size(axis).sym_gt(1))) {
        dims.emplace_back(tensor_.sym_stride(axis), tensor_.sym_size(axis));
      }
    }
    std::sort(dims.begin(), dims.end());
    c10::SymInt extent = 1;
    for (const auto& [stride, size] : dims) {
      TORCH_CHECK_VALUE(stride >= extent || tensor_.sym_numel() == 0, op_, ": ", name_,
                        ": expected a tensor that can be written in place, got ", describe(tensor_),
                        " with strides ", tensor_.sym_strides());
      extent += stride * (size - 1);
    }
    return *this;
  }

  const ArgumentCheck& device(at::Device expected) const {
    TORCH_CHECK_VALUE(tensor_.device() == expected, op_, ": ", name_, ": expected device ",
                      expected, ", got ", describe(tensor_), " on ", tensor_.device());
    return *this;
  }

  // The ops have no backward: fail here instead of returning silently detached results.
  const ArgumentCheck& no_grad() const {
    TORCH_CHECK_VALUE(!(tensor_.requires_grad() && c10::GradMode::is_enabled()), op_, ": ", name_,
                      ": expected a tensor without gradient (the op is for inference; use "
                      "torch.no_grad()), got requires_grad=True");
    return *this;
  }

 private:
  // "[N, Hk, D] with N = 3, D = 64"
  static std::string describe_shape(std::initializer_list<Dim> dims) {
    std::string symbols;
    std::string sizes;
    for (const Dim& dim : dims) {
      symbols += (symbols.empty() ? "" : ", ") + std::string(dim.symbol);
      const bool is_number =
          std::string_view("0123456789").find(dim.symbol[0]) != std::string::npos;
      if (!dim.size.has_value() || is_number) continue;
      sizes +=
          (sizes.empty() ? " with " : ", ") + std::string(dim.symbol) + " = " + to_text(*dim.size);
    }
    return "[" + symbols + "]" + sizes;
  }

  const char* op_;
  const char* name_;
  const at::Tensor& tensor_;
};

// Starts the checks of each argument of one call; all tensors must live on one device.
class OpCheck {
 public:
  OpCheck(const char* op, at::Device device) : op_(op), device_(device) {}

  ArgumentCheck operator()(const char* name, const at::Tensor& tensor) const {
    ArgumentCheck argument(op_, name, tensor);
    argument.device(device_).no_grad();
    return argument;
  }

  // A condition on a value: check.value("eps", eps >= 0, "a number >= 0", eps). A tensor is
  // described by dtype and shape.
  template <typename Got>
  void value(const char* name, bool is_valid, std::string_view expected, const Got& got) const {
    if (is_valid) return;
    if constexpr (std::is_same_v<Got, at::Tensor>) {
      TORCH_CHECK_VALUE(false, op_, ": ", name, ": expected ", expected, ", got ", describe(got));
    } else {
      TORCH_CHECK_VALUE(false, op_, ": ", name, ": expected ", expected, ", got ", got);
    }
  }

  // A number that the kernels use as float32: not one that becomes infinite there, or that is not 0
  // and becomes 0. The check is before the conversion, which is undefined outside the range.
  void float32(const char* name, double number, bool may_be_negative = false) const {
    const double magnitude = std::abs(number);
    const bool fits = number == 0 || (magnitude <= std::numeric_limits<float>::max() &&
                                      static_cast<float>(magnitude) > 0.0F);
    value(name, fits && (may_be_negative || number >= 0),
          may_be_negative ? "a finite number that float32 can hold"
                          : "a finite number >= 0 that float32 can hold",
          number);
  }

  // Of two tensors of which one or both are written: no element of `tensor` may lie between the
  // first and the last one of `other`.
  void own_memory(const char* name, const at::Tensor& tensor, const char* other_name,
                  const at::Tensor& other) const {
    if (device_.is_meta()) return;
    const auto [begin, end] = memory_of(tensor);
    const auto [other_begin, other_end] = memory_of(other);
    TORCH_CHECK_VALUE(end <= other_begin || other_end <= begin, op_, ": ", name,
                      ": expected memory of its own, got ", describe(tensor), " in the memory of ",
                      other_name);
  }

  const char* op() const { return op_; }
  at::Device device() const { return device_; }

 private:
  // First byte, and one past the last one.
  static std::pair<uintptr_t, uintptr_t> memory_of(const at::Tensor& tensor) {
    const auto begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
    if (tensor.numel() == 0) return {begin, begin};
    int64_t last = 0;
    for (int64_t axis = 0; axis < tensor.dim(); ++axis) {
      last += tensor.stride(axis) * (tensor.size(axis) - 1);
    }
    return {begin, begin + static_cast<uintptr_t>(last + 1) * tensor.element_size()};
  }

  const char* op_;
  at::Device device_;
};

}  // namespace skv::ops
