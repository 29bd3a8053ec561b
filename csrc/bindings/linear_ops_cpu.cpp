// CPU kernel of quantized_linear: check, fill params, launch.
#include <torch/library.h>

#include <cmath>
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

void check_weight(const OpCheck& check, const at::Tensor& x, const at::Tensor& weight,
                  const std::optional<at::Tensor>& scales,
                  const std::optional<at::Tensor>& minimums, int64_t out_features) {
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
}

void check_vector(const OpCheck& check, const char* name, const std::optional<at::Tensor>& vector,
                  const char* dimension, int64_t size) {
  if (!vector.has_value()) return;
  check(name, *vector).dtype({at::kFloat}).shape({{dimension, size}}).contiguous();
}

const float* data_or_null(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr<float>() : nullptr;
}

at::Tensor quantized_linear_cpu(const at::Tensor& x, const at::Tensor& weight,
                                const std::optional<at::Tensor>& scales,
                                const std::optional<at::Tensor>& minimums,
                                const std::optional<at::Tensor>& bias, int64_t out_features,
                                const std::optional<at::Tensor>& residual,
                                const std::optional<at::Tensor>& norm_weight, double norm_eps,
                                bool silu_mul) {
  const OpCheck check{"quantized_linear", x.device()};
  check("x", x).dtype({at::kFloat}).shape({{"N"}, {"K"}}).last_dim_contiguous();
  check.value("out_features", out_features >= 0, "a number >= 0", out_features);
  check.value("out_features", !silu_mul || out_features % (2 * kPanelColumns) == 0,
              "a multiple of 32 with silu_mul", out_features);
  check_weight(check, x, weight, scales, minimums, out_features);
  check_vector(check, "bias", bias, "out_features", out_features);
  check_vector(check, "norm_weight", norm_weight, "K", x.size(1));
  check.value("norm_eps", norm_eps >= 0 && std::isfinite(norm_eps), "a finite number >= 0",
              norm_eps);
  if (residual.has_value()) {
    check.value("residual", !silu_mul, "None with silu_mul", *residual);
    check("residual", *residual)
        .dtype({at::kFloat})
        .shape({{"N", x.size(0)}, {"out_features", out_features}})
        .contiguous();
  }
  at::Tensor normalised;
  if (norm_weight.has_value()) normalised = empty_tensor({x.size(0), x.size(1)}, at::kFloat, x);
  at::Tensor sums = empty_tensor({x.size(0), out_features}, at::kFloat, x);
  at::Tensor activated;
  if (silu_mul) activated = empty_tensor({x.size(0), out_features / 2}, at::kFloat, x);
  const QuantizedLinearParams params{
      .input = x.const_data_ptr<float>(),
      .weight = weight.const_data_ptr(),
      .scales = data_or_null(scales),
      .minimums = data_or_null(minimums),
      .bias = data_or_null(bias),
      .residual = data_or_null(residual),
      .norm_weight = data_or_null(norm_weight),
      .normalised = normalised.defined() ? normalised.mutable_data_ptr<float>() : nullptr,
      .sums = sums.mutable_data_ptr<float>(),
      .activated = silu_mul ? activated.mutable_data_ptr<float>() : nullptr,
      .format = format_of(weight),
      .num_rows = x.size(0),
      .in_features = x.size(1),
      .out_features = out_features,
      .input_row_stride = x.stride(0),
      .norm_epsilon = static_cast<float>(norm_eps),
  };
  cpu::kernels().quantized_linear(params, torch_parallel_for);
  return silu_mul ? activated : sums;
}

}  // namespace

TORCH_LIBRARY_IMPL(stateful_kv, CPU, m) {
  m.impl("quantized_linear", TORCH_FN(quantized_linear_cpu));
}

}  // namespace skv::bindings
