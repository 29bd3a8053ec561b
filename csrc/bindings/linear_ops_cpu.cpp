// CPU kernel of quantized_linear: check, fill params, launch.
#include <torch/library.h>

#include <optional>

#include "csrc/bindings/checks.h"
#include "csrc/bindings/torch_shim.h"
#include "csrc/kernels/cpu/select_isa.h"

namespace skv::bindings {

namespace {

WeightFormat format_of(const at::Tensor& weight) {
  if (weight.scalar_type() == at::kChar) return WeightFormat::kInt8;
  if (weight.scalar_type() == at::kByte) return WeightFormat::kInt4;
  return WeightFormat::kFloat32;
}

// One float per group of 32 along K and output column, if the weight's format has it.
void check_group_values(const OpCheck& check, const char* name,
                        const std::optional<at::Tensor>& values, bool is_wanted, int64_t num_panels,
                        int64_t in_features) {
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

void check_quantized_linear(const OpCheck& check, const at::Tensor& x, const at::Tensor& weight,
                            const std::optional<at::Tensor>& scales,
                            const std::optional<at::Tensor>& minimums,
                            const std::optional<at::Tensor>& bias, int64_t out_features,
                            const std::optional<at::Tensor>& residual) {
  check("x", x).dtype({at::kFloat}).shape({{"N"}, {"K"}}).last_dim_contiguous();
  check.value("out_features", out_features >= 0, "a number >= 0", out_features);
  const ArgumentCheck weight_check = check("weight", weight);
  weight_check.dtype({at::kFloat, at::kChar, at::kByte});
  const WeightFormat format = format_of(weight);
  const int64_t in_features = x.size(1);
  const bool is_grouped = format != WeightFormat::kFloat32;
  check.value("x", !is_grouped || in_features % kGroupSize == 0,
              "K to be a multiple of 32 for a quantised weight", x);
  const int64_t num_panels = (out_features + kPanelColumns - 1) / kPanelColumns;
  if (format == WeightFormat::kInt4) {
    weight_check.shape({{"Np", num_panels}, {"K/2", in_features / 2}, {"16", kPanelColumns}});
  } else {
    weight_check.shape({{"Np", num_panels}, {"K", in_features}, {"16", kPanelColumns}});
  }
  weight_check.contiguous();
  check_group_values(check, "scales", scales, is_grouped, num_panels, in_features);
  check_group_values(check, "minimums", minimums, format == WeightFormat::kInt4, num_panels,
                     in_features);
  if (bias.has_value()) {
    check("bias", *bias).dtype({at::kFloat}).shape({{"out_features", out_features}}).contiguous();
  }
  if (residual.has_value()) {
    check("residual", *residual)
        .dtype({at::kFloat})
        .shape({{"N", x.size(0)}, {"out_features", out_features}})
        .contiguous();
  }
}

const float* data_or_null(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr<float>() : nullptr;
}

at::Tensor quantized_linear_cpu(const at::Tensor& x, const at::Tensor& weight,
                                const std::optional<at::Tensor>& scales,
                                const std::optional<at::Tensor>& minimums,
                                const std::optional<at::Tensor>& bias, int64_t out_features,
                                const std::optional<at::Tensor>& residual) {
  const OpCheck check{"quantized_linear", x.device()};
  check_quantized_linear(check, x, weight, scales, minimums, bias, out_features, residual);
  at::Tensor output = empty_tensor({x.size(0), out_features}, at::kFloat, x);
  const QuantizedLinearParams params{
      .input = x.const_data_ptr<float>(),
      .weight = weight.const_data_ptr(),
      .scales = data_or_null(scales),
      .minimums = data_or_null(minimums),
      .bias = data_or_null(bias),
      .residual = data_or_null(residual),
      .output = output.mutable_data_ptr<float>(),
      .format = format_of(weight),
      .num_rows = x.size(0),
      .in_features = x.size(1),
      .out_features = out_features,
      .input_row_stride = x.stride(0),
  };
  cpu::kernels().quantized_linear(params, torch_parallel_for);
  return output;
}

}  // namespace

TORCH_LIBRARY_IMPL(stateful_kv, CPU, m) {
  m.impl("quantized_linear", TORCH_FN(quantized_linear_cpu));
}

}  // namespace skv::bindings
