// decoder_layers: the layers of a Llama-family model in one call. All arguments are checked before
// the first kernel runs; what runs is csrc/kernels/cpu/decoder_layers.h.
#include <torch/library.h>

#include <string>

#include "csrc/bindings/layers/decoder_args.h"

namespace skv::bindings {

namespace {

void decoder_layers_cpu(const at::Tensor& x, const c10::List<OptionalTensor>& weights,
                        const at::Tensor& positions, const at::Tensor& cos_sin,
                        const at::Tensor& slots, const at::Tensor& page_table,
                        const at::Tensor& seq_lens, const at::Tensor& query_offsets,
                        const at::Tensor& logit_rows, int64_t num_heads, double norm_eps,
                        double scale, int64_t sliding_window, const at::Tensor& k_pools,
                        const at::Tensor& v_pools, const at::Tensor& output,
                        const OptionalTensor& k_scales, const OptionalTensor& v_scales) {
  const OpCheck check{"decoder_layers", x.device()};
  check("x", x).dtype({at::kFloat}).shape({{"N"}, {"E"}}).contiguous();
  const cpu::DecoderPools pools = check_layer_pools(check, {k_pools, v_pools, k_scales, v_scales});
  check_heads(check, num_heads, pools.layout.num_kv_heads,
              "a multiple > 0 of the pools' Hk, at most 65536");
  check.value(
      "weights", static_cast<int64_t>(weights.size()) == k_pools.size(0) * int64_t{kLayerTensors},
      std::to_string(kLayerTensors) + " tensors for each layer of the pools", weights.size());
  const DecoderWeights checked(
      check, weights.vec(), cos_sin,
      {x.size(1), num_heads, pools.layout.num_kv_heads, pools.layout.head_dim},
      {norm_eps, scale, sliding_window});
  BatchCopy copy;
  const cpu::DecoderBatch batch =
      copy.take(check, {positions, slots, page_table, seq_lens, query_offsets, logit_rows},
                x.size(0), pools.layout, checked.num_positions());
  check("output", output)
      .dtype({at::kFloat})
      .shape({{"R", logit_rows.numel()}, {"E", x.size(1)}})
      .contiguous();
  check.own_memory("output", output, "x", x);
  check.own_memory("output", output, "cos_sin", cos_sin);
  check.own_memory("output", output, "k_pools", k_pools);
  check.own_memory("output", output, "v_pools", v_pools);
  if (k_scales.has_value()) {
    check.own_memory("output", output, "k_scales", *k_scales);
    check.own_memory("output", output, "v_scales", *v_scales);
  }

  cpu::DecoderWorkspace workspace;
  TORCH_CHECK(workspace.prepare(checked.model(), batch.num_rows, batch.num_logit_rows, 0),
              "decoder_layers: no memory for the activations of ", batch.num_rows, " rows");
  const PassRunner runner;
  cpu::decoder_layers(checked.model(), batch, pools, x.const_data_ptr<float>(),
                      output.mutable_data_ptr<float>(), workspace.memory(), {runner, runner});
}

}  // namespace

TORCH_LIBRARY_IMPL(stateful_kv, CPU, m) { m.impl("decoder_layers", TORCH_FN(decoder_layers_cpu)); }

}  // namespace skv::bindings
