// LayerStack of the ops library as a Python class.
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <memory>
#include <utility>
#include <vector>

#include "csrc/bindings/state/state_objects.h"
#include "csrc/ops/layers/layer_stack.h"

namespace py = pybind11;

namespace skv::bindings {

using ops::LayerStack;
using ops::OptionalTensor;

namespace {

std::unique_ptr<LayerStack> make_stack(std::vector<OptionalTensor> layers,
                                       const at::Tensor& cos_sin, const at::Tensor& embedding,
                                       const at::Tensor& norm, std::vector<OptionalTensor> head,
                                       int64_t num_logits, int64_t num_heads, int64_t num_kv_heads,
                                       double norm_eps, double scale, int64_t sliding_window) {
  return std::make_unique<LayerStack>(
      LayerStack::Weights{std::move(layers), cos_sin, embedding, norm, std::move(head), num_logits},
      num_heads, num_kv_heads, ops::DecoderScalars{norm_eps, scale, sliding_window});
}

// A method with the arguments of a pass, then Extra.
template <auto method, typename... Extra>
auto pass_method() {
  return torch::wrap_pybind_function_no_gil(
      [](LayerStack& self, const at::Tensor& token_ids, const at::Tensor& positions,
         const at::Tensor& slots, const at::Tensor& page_table, const at::Tensor& seq_lens,
         const at::Tensor& query_offsets, const at::Tensor& logit_rows, const at::Tensor& k_pools,
         const at::Tensor& v_pools, const OptionalTensor& k_scales, const OptionalTensor& v_scales,
         Extra... extra) {
        return (self.*method)({token_ids,
                               {positions, slots, page_table, seq_lens, query_offsets, logit_rows},
                               {k_pools, v_pools, k_scales, v_scales}},
                              extra...);
      });
}

template <typename Class, typename Method, typename... Extra>
void bind_pass(Class& stack, const char* name, Method method, Extra... extra) {
  stack.def(name, method, py::arg("token_ids"), py::arg("positions"), py::arg("slots"),
            py::arg("page_table"), py::arg("seq_lens"), py::arg("query_offsets"),
            py::arg("logit_rows"), py::arg("k_pools"), py::arg("v_pools"), py::arg("k_scales"),
            py::arg("v_scales"), extra...);
}

}  // namespace

void bind_layers(py::module_& module) {
  py::class_<LayerStack> stack(module, "LayerStack");
  stack.def(py::init(torch::wrap_pybind_function(&make_stack)), py::arg("layers"),
            py::arg("cos_sin"), py::arg("embedding"), py::arg("norm"), py::arg("head"),
            py::arg("num_logits"), py::arg("num_heads"), py::arg("num_kv_heads"),
            py::arg("norm_eps"), py::arg("scale"), py::arg("sliding_window"));
  bind_pass(stack, "run", pass_method<&LayerStack::run>());
  bind_pass(stack, "forward", pass_method<&LayerStack::forward>());
  bind_pass(stack, "forward_top_k", pass_method<&LayerStack::forward_top_k, int64_t>(),
            py::arg("k"));
}

}  // namespace skv::bindings
