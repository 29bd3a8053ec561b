// The schemas of all ops. A mutating op returns nothing and marks every tensor it writes; kernels
// are registered by device key in the room of their area: ops/*/cpu.cpp, ops/*/cuda.cpp, and for
// tracing ops/*/meta.cpp. Their documentation is in the package stateful_kv.ops.
#include <ATen/core/enum_tag.h>
#include <torch/library.h>

TORCH_LIBRARY(stateful_kv, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def(
      "append_kv(Tensor k, Tensor v, Tensor slots, Tensor(a!) k_pool, Tensor(b!) v_pool, "
      "Tensor(c!)? k_scales=None, Tensor(d!)? v_scales=None) -> ()",
      tags);
  m.def(
      "copy_pages(Tensor page_copies, Tensor(a!) k_pool, Tensor(b!) v_pool, "
      "Tensor(c!)? k_scales=None, Tensor(d!)? v_scales=None) -> ()",
      tags);
  m.def(
      "paged_attention(Tensor q, Tensor k_pool, Tensor v_pool, Tensor page_table, Tensor seq_lens, "
      "Tensor query_offsets, float scale, int sliding_window=0, float soft_cap=0.0, "
      "Tensor? k_scales=None, Tensor? v_scales=None) -> Tensor",
      tags);
  m.def(
      "shared_prefix_attention(Tensor q, Tensor k_pool, Tensor v_pool, Tensor page_table, "
      "Tensor seq_lens, Tensor query_offsets, Tensor group_offsets, Tensor prefix_lens, "
      "float scale, int sliding_window=0, float soft_cap=0.0, Tensor? k_scales=None, "
      "Tensor? v_scales=None) -> Tensor",
      tags);
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", tags);
  m.def(
      "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor normalised, "
      "Tensor sum)",
      tags);
  m.def(
      "rope_append_kv(Tensor(a!) q, Tensor k, Tensor v, Tensor positions, Tensor cos_sin, "
      "Tensor slots, Tensor(b!) k_pool, Tensor(c!) v_pool, Tensor(d!)? k_scales=None, "
      "Tensor(e!)? v_scales=None) -> ()",
      tags);
  m.def("silu_mul(Tensor gate_up) -> Tensor", tags);
  m.def(
      "quantized_linear(Tensor x, Tensor weight, Tensor? scales, Tensor? minimums, Tensor? bias, "
      "int out_features, Tensor? residual=None, Tensor? norm_weight=None, float norm_eps=0.0, "
      "bool silu_mul=False) -> Tensor",
      tags);
  m.def(
      "linear_top_k(Tensor x, Tensor weight, Tensor? scales, Tensor? minimums, Tensor? bias, "
      "int out_features, int k, Tensor? norm_weight=None, float norm_eps=0.0) -> "
      "(Tensor ids, Tensor values)",
      tags);
  m.def(
      "decoder_layers(Tensor x, Tensor?[] weights, Tensor positions, Tensor cos_sin, Tensor slots, "
      "Tensor page_table, Tensor seq_lens, Tensor query_offsets, Tensor logit_rows, int num_heads, "
      "float norm_eps, float scale, int sliding_window, Tensor(a!) k_pools, Tensor(b!) v_pools, "
      "Tensor(c!) output, Tensor(d!)? k_scales=None, Tensor(e!)? v_scales=None) -> ()",
      tags);
  m.def("argmax(Tensor logits) -> (Tensor ids, Tensor values)", tags);
  m.def(
      "sample(Tensor logits, Tensor seeds, Tensor positions, Tensor temperatures, Tensor top_k, "
      "Tensor top_p, Tensor min_p) -> (Tensor ids, Tensor values)",
      tags);
  m.def(
      "ngram_lookup(Tensor tokens, Tensor offsets, int min_n, int max_n, int max_draft, "
      "Tensor? lengths=None) -> (Tensor draft_ids, Tensor num_draft)",
      tags);
  m.def(
      "verify_draft(Tensor draft_ids, Tensor target_ids, Tensor draft_offsets) -> "
      "(Tensor num_accepted, Tensor bonus_ids)",
      tags);
  m.def(
      "fill_rows(Tensor history, Tensor lengths, Tensor num_left, Tensor kv_limits, "
      "Tensor draft_ids, Tensor num_draft, Tensor page_table, int page_size) -> "
      "(Tensor token_ids, Tensor positions, Tensor slots, Tensor seq_lens, Tensor query_offsets, "
      "Tensor row_sequences)",
      tags);
  m.def(
      "advance_sequences(Tensor token_ids, Tensor target_ids, Tensor target_values, "
      "Tensor query_offsets, Tensor stop_ids, Tensor(a!) history, Tensor(b!) lengths, "
      "Tensor(c!) num_left, Tensor(d!) counts) -> ()",
      tags);
}
