// The arguments of quantized_linear and linear_top_k: checks that hold on every device and for
// tracing, the outputs, and the parameters of the kernel.
#pragma once

#include <cstdint>
#include <string>
#include <tuple>

#include "csrc/kernels/params.h"
#include "csrc/ops/checks.h"
#include "csrc/ops/torch_shim.h"

namespace skv::ops {

struct QuantizedLinearArgs {
  const at::Tensor& x;
  const at::Tensor& weight;
  const OptionalTensor& scales;
  const OptionalTensor& minimums;
  const OptionalTensor& bias;
  int64_t out_features;
  const OptionalTensor& residual;
  const OptionalTensor& norm_weight;
  double norm_eps;
  bool silu_mul;
};

inline WeightFormat format_of(const at::Tensor& weight) {
  if (weight.scalar_type() == at::kChar) return WeightFormat::kInt8;
  if (weight.scalar_type() == at::kByte) return WeightFormat::kInt4;
  return WeightFormat::kFloat32;
}

// One float per group of 32 along K and output column, if the weight's format has it.
inline void check_group_values(const OpCheck& check, const char* name, const OptionalTensor& values,
                               bool is_wanted, int64_t num_panels, const c10::SymInt& in_features) {
  TORCH_CHECK_VALUE(
      values.has_value() == is_wanted, check.op(), ": ", name, ": expected ",
      is_wanted ? "float32[Np, K/32, 16] for this weight dtype" : "None for this weight dtype",
      ", got ", values.has_value() ? describe(*values) : "None");
  if (!is_wanted) return;
  check(name, *values)
      .dtype({at::kFloat})
      .shape({{"Np", num_panels}, {"K/32", in_features / kGroupSize}, {"16", kPanelColumns}})
      .contiguous();
}

inline void check_weight(const OpCheck& check, const at::Tensor& x, const at::Tensor& weight,
                         const OptionalTensor& scales, const OptionalTensor& minimums,
                         int64_t out_features) {
  const ArgumentCheck weight_check = check("weight", weight);
  weight_check.dtype({at::kFloat, at::kChar, at::kByte});
  const WeightFormat format = format_of(weight);
  const c10::SymInt in_features = x.sym_size(1);
  const bool is_grouped = format != WeightFormat::kFloat32;
  check.value("x", !is_grouped || in_features % kGroupSize == 0,
              "K to be a multiple of 32 for a quantised weight", x);
  const int64_t num_panels =
      out_features / kPanelColumns + (out_features % kPanelColumns != 0 ? 1 : 0);
  if (format == WeightFormat::kInt4) {
    weight_check.shape({{"Np", num_panels}, {"K/2", in_features / 2}, {"16", kPanelColumns}});
  } else {
    weight_check.shape({{"Np", num_panels}, {"K", in_features}, {"16", kPanelColumns}});
  }
  weight_check.contiguous();
  check_group_values(check, "scales", scales, is_grouped, num_panels, in_features);
  check_group_values(check, "minimums", minimums, format == WeightFormat::kInt4, num_panels,
                     in_features);
}

inline void check_vector(const OpCheck& check, const char* name, const OptionalTensor& vector,
                         const char* dimension, const c10::SymInt& size, DtypeList dtypes) {
  if (!vector.has_value()) return;
  check(name, *vector).dtype(dtypes).shape({{dimension, size}}).contiguous();
}

inline const float* data_or_null(const OptionalTensor& tensor) {
  const bool has_memory = tensor.has_value() && !tensor->is_meta();
  return has_memory ? tensor->const_data_ptr<float>() : nullptr;
}

// Of a tensor in any float dtype, and that dtype.
inline const void* address_or_null(const OptionalTensor& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr() : nullptr;
}
inline DType dtype_or_float32(const OptionalTensor& tensor) {
  return tensor.has_value() ? dtype_of(*tensor) : DType::kFloat32;
}

inline void check_quantized_linear(const OpCheck& check, const QuantizedLinearArgs& args) {
  const at::Tensor& x = args.x;
  const int64_t out_features = args.out_features;
  check("x", x).dtype(kFloatDtypes).shape({{"N"}, {"K"}}).last_dim_contiguous();
  check.value("out_features", out_features >= 0, "a number >= 0", out_features);
  check.value("out_features", !args.silu_mul || out_features % (2 * kPanelColumns) == 0,
              "a multiple of 32 with silu_mul", out_features);
  check_weight(check, x, args.weight, args.scales, args.minimums, out_features);
  check_vector(check, "bias", args.bias, "out_features", out_features, kFloatDtypes);
  check_vector(check, "norm_weight", args.norm_weight, "K", x.sym_size(1), kFloatDtypes);
  check.float32("norm_eps", args.norm_eps);
  if (args.residual.has_value()) {
    check.value("residual", !args.silu_mul, "None with silu_mul", *args.residual);
    check("residual", *args.residual)
        .dtype({x.scalar_type()})
        .shape({{"N", x.sym_size(0)}, {"out_features", out_features}})
        .contiguous();
  }
}

inline void check_top_k(const OpCheck& check, const QuantizedLinearArgs& args, int64_t k) {
  check_quantized_linear(check, args);
  check.value("k", k >= 1 && k <= kMaxTopK, "a number from 1 to " + std::to_string(kMaxTopK), k);
  check.value("k", k <= args.out_features, "a number <= out_features", k);
}

// Of quantized_linear.
inline at::Tensor empty_linear_output(const QuantizedLinearArgs& args) {
  const int64_t width = args.silu_mul ? args.out_features / 2 : args.out_features;
  return empty_tensor({args.x.sym_size(0), width}, args.x.scalar_type(), args.x);
}

// Of linear_top_k: ids and values.
inline std::tuple<at::Tensor, at::Tensor> empty_top_k(const at::Tensor& x, int64_t k) {
  return {empty_tensor({x.sym_size(0), k}, at::kLong, x),
          empty_tensor({x.sym_size(0), k}, at::kFloat, x)};
}

// Memory for the sums and whatever else the product needs on the way.
struct QuantizedLinearMemory {
  at::Tensor float_input;  // with norm_weight or a 16-bit x: at least N * K floats
  at::Tensor sums;         // at least N * out_features floats, if the sums are wanted
  at::Tensor activated;    // with silu_mul: [N, out_features / 2], dtype of x
  at::Tensor rounded;      // of a 16-bit x without silu_mul: [N, out_features], dtype of x
};

inline QuantizedLinearParams params_of(const QuantizedLinearArgs& args,
                                       const QuantizedLinearMemory& memory) {
  return {
      .input = args.x.const_data_ptr(),
      .weight = args.weight.const_data_ptr(),
      .scales = data_or_null(args.scales),
      .minimums = data_or_null(args.minimums),
      .bias = address_or_null(args.bias),
      .residual = address_or_null(args.residual),
      .norm_weight = address_or_null(args.norm_weight),
      .float_input =
          memory.float_input.defined() ? memory.float_input.mutable_data_ptr<float>() : nullptr,
      .sums = memory.sums.defined() ? memory.sums.mutable_data_ptr<float>() : nullptr,
      .activated = args.silu_mul ? memory.activated.mutable_data_ptr() : nullptr,
      .format = format_of(args.weight),
      .num_rows = args.x.size(0),
      .in_features = args.x.size(1),
      .out_features = args.out_features,
      .input_row_stride = args.x.stride(0),
      .norm_epsilon = static_cast<float>(args.norm_eps),
      .rounded = memory.rounded.defined() ? memory.rounded.mutable_data_ptr() : nullptr,
      .activation_dtype = dtype_of(args.x),
      .bias_dtype = dtype_or_float32(args.bias),
      .norm_weight_dtype = dtype_or_float32(args.norm_weight),
  };
}

}  // namespace skv::ops
