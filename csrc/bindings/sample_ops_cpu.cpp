// CPU kernel of sample: check, fill params, launch.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string_view>
#include <tuple>

#include "csrc/bindings/checks.h"
#include "csrc/bindings/sample_args.h"
#include "csrc/bindings/torch_shim.h"
#include "csrc/kernels/cpu/sample.h"

namespace skv::bindings {

namespace {

template <typename Value, typename IsValid>
void check_values(const OpCheck& check, const char* name, const Value* values, int64_t count,
                  std::string_view expected, IsValid is_valid) {
  for (int64_t i = 0; i < count; ++i) {
    TORCH_CHECK_VALUE(is_valid(values[i]), check.op(), ": ", name, ": expected ", expected,
                      ", got ", values[i], " at index ", i);
  }
}

void check_sample_values(const OpCheck& check, const SampleParams& params) {
  const int64_t rows = params.num_rows;
  const auto is_not_negative = [](auto value) { return value >= 0; };
  const auto is_share = [](float value) { return value >= 0.0F && value <= 1.0F; };
  check_values(check, "positions", params.positions, rows, "numbers >= 0", is_not_negative);
  check_values(check, "temperatures", params.temperatures, rows, "finite numbers >= 0",
               [](float value) { return value >= 0.0F && std::isfinite(value); });
  check_values(check, "top_k", params.top_k, rows, "numbers >= 0", is_not_negative);
  check_values(check, "top_p", params.top_p, rows, "numbers from 0 to 1", is_share);
  check_values(check, "min_p", params.min_p, rows, "numbers from 0 to 1", is_share);
}

std::tuple<at::Tensor, at::Tensor> sample_cpu(const at::Tensor& logits, const at::Tensor& seeds,
                                              const at::Tensor& positions,
                                              const at::Tensor& temperatures,
                                              const at::Tensor& top_k, const at::Tensor& top_p,
                                              const at::Tensor& min_p) {
  const OpCheck check{"sample", logits.device()};
  SampleParams params =
      sample_params(check, {logits, seeds, positions, temperatures, top_k, top_p, min_p});
  check_sample_values(check, params);

  at::Tensor ids = empty_tensor({params.num_rows}, at::kLong, logits);
  at::Tensor values = empty_tensor({params.num_rows}, at::kFloat, logits);
  params.ids = ids.mutable_data_ptr<int64_t>();
  params.values = values.mutable_data_ptr<float>();
  const int64_t num_slots = std::min<int64_t>(params.num_rows, at::get_num_threads());
  if (num_slots == 0) return {ids, values};
  const at::Tensor scratch =
      empty_tensor({num_slots * cpu::sample_scratch_bytes(params.vocab_size)}, at::kByte, logits);
  cpu::sample(params, scratch.mutable_data_ptr(), num_slots, torch_parallel_for);
  return {ids, values};
}

}  // namespace

TORCH_LIBRARY_IMPL(stateful_kv, CPU, m) { m.impl("sample", TORCH_FN(sample_cpu)); }

}  // namespace skv::bindings
