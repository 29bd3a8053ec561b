// The arguments of argmax, sample and verify_draft: checks that hold on every device and for
// tracing, the outputs, and the parameters of the kernels.
#pragma once

#include <cstdint>
#include <limits>
#include <tuple>

#include "csrc/kernels/token_params.h"
#include "csrc/ops/checks.h"
#include "csrc/ops/offsets.h"
#include "csrc/ops/torch_shim.h"

namespace skv::ops {

// ids and values, one for each row of logits.
inline TwoTensors empty_choices(const at::Tensor& logits) {
  return {empty_tensor({logits.sym_size(0)}, at::kLong, logits),
          empty_tensor({logits.sym_size(0)}, at::kFloat, logits)};
}

inline void check_argmax(const OpCheck& check, const at::Tensor& logits) {
  check("logits", logits).dtype(kFloatDtypes).shape({{"R"}, {"V"}}).last_dim_contiguous();
  check.value("logits", logits.sym_size(1) > 0, "V >= 1", logits);
}

inline ArgmaxParams argmax_params(const at::Tensor& logits, const TwoTensors& choices) {
  return {
      .logits = logits.const_data_ptr(),
      .ids = std::get<0>(choices).mutable_data_ptr<int64_t>(),
      .values = std::get<1>(choices).mutable_data_ptr<float>(),
      .logits_dtype = dtype_of(logits),
      .num_rows = logits.size(0),
      .vocab_size = logits.size(1),
      .row_stride = logits.stride(0),
  };
}

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

inline void check_sample(const OpCheck& check, const SampleArgs& args) {
  check("logits", args.logits).dtype(kFloatDtypes).shape({{"R"}, {"V"}}).last_dim_contiguous();
  const c10::SymInt rows = args.logits.sym_size(0);
  const c10::SymInt vocab_size = args.logits.sym_size(1);
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
}

inline SampleParams params_of(const SampleArgs& args, const TwoTensors& choices) {
  return {
      .logits = args.logits.const_data_ptr(),
      .seeds = args.seeds.const_data_ptr<int64_t>(),
      .positions = args.positions.const_data_ptr<int64_t>(),
      .temperatures = args.temperatures.const_data_ptr<float>(),
      .top_k = args.top_k.const_data_ptr<int32_t>(),
      .top_p = args.top_p.const_data_ptr<float>(),
      .min_p = args.min_p.const_data_ptr<float>(),
      .ids = std::get<0>(choices).mutable_data_ptr<int64_t>(),
      .values = std::get<1>(choices).mutable_data_ptr<float>(),
      .logits_dtype = dtype_of(args.logits),
      .num_rows = args.logits.size(0),
      .vocab_size = args.logits.size(1),
      .row_stride = args.logits.stride(0),
  };
}

struct VerifyDraftArgs {
  const at::Tensor& draft_ids;
  const at::Tensor& target_ids;
  const at::Tensor& draft_offsets;
};

inline void check_verify_draft(const OpCheck& check, const VerifyDraftArgs& args) {
  check("draft_ids", args.draft_ids).dtype(kIdDtypes).shape({{"sum k_s"}}).contiguous();
  const c10::SymInt num_sequences = check_offsets_shape(check, "draft_offsets", args.draft_offsets);
  check("target_ids", args.target_ids)
      .dtype({args.draft_ids.scalar_type()})
      .shape({{"sum k_s + S", args.draft_ids.sym_size(0) + num_sequences}})
      .contiguous();
}

// num_accepted and bonus_ids, one for each sequence.
inline TwoTensors empty_verdicts(const VerifyDraftArgs& args) {
  const c10::SymInt num_sequences = args.draft_offsets.sym_size(0) - 1;
  return {empty_tensor({num_sequences}, at::kInt, args.draft_ids),
          empty_tensor({num_sequences}, args.draft_ids.scalar_type(), args.draft_ids)};
}

inline VerifyDraftParams params_of(const VerifyDraftArgs& args, const TwoTensors& verdicts) {
  return {
      .draft_ids = args.draft_ids.const_data_ptr(),
      .target_ids = args.target_ids.const_data_ptr(),
      .draft_offsets = args.draft_offsets.const_data_ptr<int32_t>(),
      .num_accepted = std::get<0>(verdicts).mutable_data_ptr<int32_t>(),
      .bonus_ids = std::get<1>(verdicts).mutable_data_ptr(),
      .ids_are_int64 = args.draft_ids.scalar_type() == at::kLong,
      .num_sequences = args.draft_offsets.numel() - 1,
  };
}

}  // namespace skv::ops
