// The arguments of sample: checks that hold on every device, and the parameters of the kernels
// without their output.
#pragma once

#include <cstdint>
#include <limits>

#include "csrc/bindings/checks.h"
#include "csrc/bindings/torch_shim.h"
#include "csrc/kernels/token_params.h"

namespace skv::bindings {

// The tensors of one call of sample, in the order of its schema.
struct SampleArgs {
  const at::Tensor& logits;
  const at::Tensor& seeds;
  const at::Tensor& positions;
  const at::Tensor& temperatures;
  const at::Tensor& top_k;
  const at::Tensor& top_p;
  const at::Tensor& min_p;
};

inline SampleParams sample_params(const OpCheck& check, const SampleArgs& args) {
  check("logits", args.logits).dtype(kPoolDtypes).shape({{"R"}, {"V"}}).last_dim_contiguous();
  const int64_t rows = args.logits.size(0);
  const int64_t vocab_size = args.logits.size(1);
  check.value("logits", vocab_size > 0 && vocab_size < std::numeric_limits<int32_t>::max(),
              "1 <= V < 2^31 - 1", args.logits);
  const auto per_row = [&](const char* name, const at::Tensor& tensor, at::ScalarType dtype) {
    check(name, tensor).dtype({dtype}).shape({{"R", rows}}).contiguous();
  };
  per_row("seeds", args.seeds, at::kLong);
  per_row("positions", args.positions, at::kLong);
  per_row("temperatures", args.temperatures, at::kFloat);
  per_row("top_k", args.top_k, at::kInt);
  per_row("top_p", args.top_p, at::kFloat);
  per_row("min_p", args.min_p, at::kFloat);
  return {
      .logits = args.logits.const_data_ptr(),
      .seeds = args.seeds.const_data_ptr<int64_t>(),
      .positions = args.positions.const_data_ptr<int64_t>(),
      .temperatures = args.temperatures.const_data_ptr<float>(),
      .top_k = args.top_k.const_data_ptr<int32_t>(),
      .top_p = args.top_p.const_data_ptr<float>(),
      .min_p = args.min_p.const_data_ptr<float>(),
      .ids = nullptr,
      .values = nullptr,
      .logits_dtype = dtype_of(args.logits),
      .num_rows = rows,
      .vocab_size = vocab_size,
      .row_stride = args.logits.stride(0),
  };
}

}  // namespace skv::bindings
