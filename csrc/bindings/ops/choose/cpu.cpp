// CPU kernels of argmax, sample and verify_draft: check values, launch.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string_view>
#include <tuple>

#include "csrc/bindings/checks.h"
#include "csrc/bindings/ops/choose/args.h"
#include "csrc/bindings/ops/offsets.h"
#include "csrc/bindings/torch_shim.h"
#include "csrc/kernels/cpu/sample.h"
#include "csrc/kernels/cpu/select_isa.h"
#include "csrc/kernels/cpu/verify_draft.h"

namespace skv::bindings {

namespace {

std::tuple<at::Tensor, at::Tensor> argmax_cpu(const at::Tensor& logits) {
  const OpCheck check{"argmax", logits.device()};
  const ArgmaxCall call = argmax_call(check, logits, kPoolDtypes);
  cpu::kernels().argmax(call.params, torch_parallel_for);
  return call.results();
}

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
  const SampleCall call =
      sample_call(check, {logits, seeds, positions, temperatures, top_k, top_p, min_p});
  const SampleParams& params = call.params;
  check_sample_values(check, params);
  const int64_t num_slots = std::min<int64_t>(params.num_rows, at::get_num_threads());
  if (num_slots == 0) return call.results();
  const at::Tensor scratch =
      empty_tensor({num_slots * cpu::sample_scratch_bytes(params.vocab_size)}, at::kByte, logits);
  cpu::sample(params, scratch.mutable_data_ptr(), num_slots, torch_parallel_for);
  return call.results();
}

std::tuple<at::Tensor, at::Tensor> verify_draft_cpu(const at::Tensor& draft_ids,
                                                    const at::Tensor& target_ids,
                                                    const at::Tensor& draft_offsets) {
  const OpCheck check{"verify_draft", draft_ids.device()};
  const VerifyDraftCall call = verify_draft_call(check, draft_ids, target_ids, draft_offsets);
  check_offset_values(check, "draft_offsets", draft_offsets, draft_ids.numel());
  cpu::verify_draft(call.params, torch_parallel_for);
  return call.results();
}

}  // namespace

TORCH_LIBRARY_IMPL(stateful_kv, CPU, m) {
  m.impl("argmax", TORCH_FN(argmax_cpu));
  m.impl("sample", TORCH_FN(sample_cpu));
  m.impl("verify_draft", TORCH_FN(verify_draft_cpu));
}

}  // namespace skv::bindings
