// CPU kernels of argmax, sample and verify_draft: check values, launch.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string_view>

#include "csrc/kernels/cpu/sample.h"
#include "csrc/kernels/cpu/select_isa.h"
#include "csrc/kernels/cpu/verify_draft.h"
#include "csrc/ops/checks.h"
#include "csrc/ops/choose/args.h"
#include "csrc/ops/offsets.h"
#include "csrc/ops/torch_shim.h"

namespace skv::ops {

namespace {

TwoTensors argmax_cpu(const at::Tensor& logits) {
  const OpCheck check{"argmax", logits.device()};
  check_argmax(check, logits);
  TwoTensors choices = empty_choices(logits);
  cpu::kernels().argmax(argmax_params(logits, choices), torch_parallel_for);
  return choices;
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

TwoTensors sample_cpu(const at::Tensor& logits, const at::Tensor& seeds,
                      const at::Tensor& positions, const at::Tensor& temperatures,
                      const at::Tensor& top_k, const at::Tensor& top_p, const at::Tensor& min_p) {
  const OpCheck check{"sample", logits.device()};
  const SampleArgs args{logits, seeds, positions, temperatures, top_k, top_p, min_p};
  check_sample(check, args);
  TwoTensors choices = empty_choices(logits);
  const SampleParams params = params_of(args, choices);
  check_sample_values(check, params);
  const int64_t num_slots = std::min<int64_t>(params.num_rows, at::get_num_threads());
  if (num_slots == 0) return choices;
  const at::Tensor scratch =
      empty_tensor({num_slots * cpu::sample_scratch_bytes(params.vocab_size)}, at::kByte, logits);
  cpu::sample(params, scratch.mutable_data_ptr(), num_slots, torch_parallel_for);
  return choices;
}

TwoTensors verify_draft_cpu(const at::Tensor& draft_ids, const at::Tensor& target_ids,
                            const at::Tensor& draft_offsets) {
  const OpCheck check{"verify_draft", draft_ids.device()};
  const VerifyDraftArgs args{draft_ids, target_ids, draft_offsets};
  check_verify_draft(check, args);
  check_offset_values(check, "draft_offsets", draft_offsets, draft_ids.numel());
  TwoTensors verdicts = empty_verdicts(args);
  cpu::verify_draft(params_of(args, verdicts), torch_parallel_for);
  return verdicts;
}

}  // namespace

TORCH_LIBRARY_IMPL(stateful_kv, CPU, m) {
  m.impl("argmax", TORCH_FN(argmax_cpu));
  m.impl("sample", TORCH_FN(sample_cpu));
  m.impl("verify_draft", TORCH_FN(verify_draft_cpu));
}

}  // namespace skv::ops
