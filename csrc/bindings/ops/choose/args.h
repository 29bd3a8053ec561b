// The arguments of argmax, sample and verify_draft: checks that hold on every device, the outputs,
// and the parameters of the kernels.
#pragma once

#include <cstdint>
#include <limits>
#include <tuple>
#include <utility>

#include "csrc/bindings/checks.h"
#include "csrc/bindings/ops/offsets.h"
#include "csrc/bindings/torch_shim.h"
#include "csrc/kernels/token_params.h"

namespace skv::bindings {

struct ArgmaxCall {
  at::Tensor ids;
  at::Tensor values;
  ArgmaxParams params;

  std::tuple<at::Tensor, at::Tensor> results() const { return {ids, values}; }
};

inline ArgmaxCall argmax_call(const OpCheck& check, const at::Tensor& logits, DtypeList dtypes) {
  check("logits", logits).dtype(dtypes).shape({{"R"}, {"V"}}).last_dim_contiguous();
  check.value("logits", logits.size(1) > 0, "V >= 1", logits);
  at::Tensor ids = empty_tensor({logits.size(0)}, at::kLong, logits);
  at::Tensor values = empty_tensor({logits.size(0)}, at::kFloat, logits);
  const ArgmaxParams params{
      .logits = logits.const_data_ptr(),
      .ids = ids.mutable_data_ptr<int64_t>(),
      .values = values.mutable_data_ptr<float>(),
      .logits_dtype = dtype_of(logits),
      .num_rows = logits.size(0),
      .vocab_size = logits.size(1),
      .row_stride = logits.stride(0),
  };
  return {std::move(ids), std::move(values), params};
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

struct SampleCall {
  at::Tensor ids;
  at::Tensor values;
  SampleParams params;

  std::tuple<at::Tensor, at::Tensor> results() const { return {ids, values}; }
};

inline SampleCall sample_call(const OpCheck& check, const SampleArgs& args) {
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
  at::Tensor ids = empty_tensor({rows}, at::kLong, args.logits);
  at::Tensor values = empty_tensor({rows}, at::kFloat, args.logits);
  const SampleParams params{
      .logits = args.logits.const_data_ptr(),
      .seeds = args.seeds.const_data_ptr<int64_t>(),
      .positions = args.positions.const_data_ptr<int64_t>(),
      .temperatures = args.temperatures.const_data_ptr<float>(),
      .top_k = args.top_k.const_data_ptr<int32_t>(),
      .top_p = args.top_p.const_data_ptr<float>(),
      .min_p = args.min_p.const_data_ptr<float>(),
      .ids = ids.mutable_data_ptr<int64_t>(),
      .values = values.mutable_data_ptr<float>(),
      .logits_dtype = dtype_of(args.logits),
      .num_rows = rows,
      .vocab_size = vocab_size,
      .row_stride = args.logits.stride(0),
  };
  return {std::move(ids), std::move(values), params};
}

struct VerifyDraftCall {
  at::Tensor num_accepted;
  at::Tensor bonus_ids;
  VerifyDraftParams params;

  std::tuple<at::Tensor, at::Tensor> results() const { return {num_accepted, bonus_ids}; }
};

inline VerifyDraftCall verify_draft_call(const OpCheck& check, const at::Tensor& draft_ids,
                                         const at::Tensor& target_ids,
                                         const at::Tensor& draft_offsets) {
  check("draft_ids", draft_ids).dtype(kIdDtypes).shape({{"sum k_s"}}).contiguous();
  const int64_t num_sequences = check_offsets_shape(check, "draft_offsets", draft_offsets);
  check("target_ids", target_ids)
      .dtype({draft_ids.scalar_type()})
      .shape({{"sum k_s + S", draft_ids.numel() + num_sequences}})
      .contiguous();
  at::Tensor num_accepted = empty_tensor({num_sequences}, at::kInt, draft_ids);
  at::Tensor bonus_ids = empty_tensor({num_sequences}, draft_ids.scalar_type(), draft_ids);
  const VerifyDraftParams params{
      .draft_ids = draft_ids.const_data_ptr(),
      .target_ids = target_ids.const_data_ptr(),
      .draft_offsets = draft_offsets.const_data_ptr<int32_t>(),
      .num_accepted = num_accepted.mutable_data_ptr<int32_t>(),
      .bonus_ids = bonus_ids.mutable_data_ptr(),
      .ids_are_int64 = draft_ids.scalar_type() == at::kLong,
      .num_sequences = num_sequences,
  };
  return {std::move(num_accepted), std::move(bonus_ids), params};
}

}  // namespace skv::bindings
