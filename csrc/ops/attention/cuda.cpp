// paged_attention and shared_prefix_attention on CUDA: check what CUDA alone wants, launch.
// Contents of the page table and the lengths are not checked here, which would need a
// synchronisation.
#include <torch/library.h>

#include <cstdint>
#include <cstdlib>
#include <string>
#include <utility>

#include "csrc/kernels/cuda/attention.h"
#include "csrc/kernels/cuda/kernels.h"
#include "csrc/ops/attention/args.h"
#include "csrc/ops/checks.h"
#include "csrc/ops/cuda_launch.h"
#include "csrc/ops/torch_shim.h"

namespace skv::ops {

namespace {

template <int... kDims>
void check_head_dim(const OpCheck& check, int64_t head_dim, std::integer_sequence<int, kDims...>) {
  std::string available;
  ((available += (available.empty() ? "" : ", ") + std::to_string(kDims)), ...);
  check.value("k_pool", ((head_dim == kDims) || ...), "a head_dim that is built: " + available,
              head_dim);
}

// Tests choose how the work is divided, to see that it changes no bit. STATEFUL_KV_WGMMA=1 is for
// users too: see docs/adr/0017-warpgroup-products-on-request.md.
cuda::AttentionTuning tuning_of_environment() {
  const auto number = [](const char* name) {
    const char* text = std::getenv(name);
    return text == nullptr ? -1 : std::atoi(text);
  };
  return {.run_log2 = number("SKV_ATTENTION_RUN_LOG2"),
          .warps = number("SKV_ATTENTION_WARPS"),
          .use_warpgroups = number("STATEFUL_KV_WGMMA") == 1};
}

// prefixes: of shared_prefix_attention, else null.
at::Tensor attend(const OpCheck& check, const PagedAttentionArgs& args,
                  const SharedPrefixArgs* prefixes) {
  check_attention(check, args, prefixes);
  const KvLayout layout = layout_of(args.k_pool);
  check_head_dim(check, layout.head_dim, cuda::HeadDims{});
  check_pool_alignment(check, "k_pool", args.k_pool);
  check_pool_alignment(check, "v_pool", args.v_pool);
  const int64_t num_positions = args.page_table.size(1) * layout.page_size;
  check.value("page_table", num_positions <= cuda::kMaxPositions,
              "M * B to be at most " + std::to_string(cuda::kMaxPositions), num_positions);
  const at::Tensor& q = args.q;
  const c10::cuda::CUDAGuard guard(q.device());  // the plan asks for the limits of the device
  const at::Tensor output = empty_attention_output(args);
  cuda::PagedAttentionCall call{
      .params = params_of(args, output), .prefixes = {}, .tuning = tuning_of_environment()};
  if (prefixes != nullptr) call.prefixes = prefixes_of(*prefixes);
  const cudaError_t status = cuda::paged_attention_scratch(call, &call.scratch_bytes);
  TORCH_CHECK(status == cudaSuccess, check.op(),
              ": CUDA cannot plan the launch: ", cudaGetErrorString(status));
  const at::Tensor scratch = empty_tensor({call.scratch_bytes}, at::kByte, q);
  call.scratch = scratch.mutable_data_ptr();
  launch(check.op(), cuda::paged_attention, call, q);
  return output;
}

at::Tensor paged_attention_cuda(const at::Tensor& q, const at::Tensor& k_pool,
                                const at::Tensor& v_pool, const at::Tensor& page_table,
                                const at::Tensor& seq_lens, const at::Tensor& query_offsets,
                                double scale, int64_t sliding_window, double soft_cap,
                                const OptionalTensor& k_scales, const OptionalTensor& v_scales) {
  const OpCheck check{"paged_attention", q.device()};
  return attend(check,
                {q, k_pool, v_pool, page_table, seq_lens, query_offsets, scale, sliding_window,
                 soft_cap, k_scales, v_scales},
                nullptr);
}

at::Tensor shared_prefix_attention_cuda(const at::Tensor& q, const at::Tensor& k_pool,
                                        const at::Tensor& v_pool, const at::Tensor& page_table,
                                        const at::Tensor& seq_lens, const at::Tensor& query_offsets,
                                        const at::Tensor& group_offsets,
                                        const at::Tensor& prefix_lens, double scale,
                                        int64_t sliding_window, double soft_cap,
                                        const OptionalTensor& k_scales,
                                        const OptionalTensor& v_scales) {
  const OpCheck check{"shared_prefix_attention", q.device()};
  const SharedPrefixArgs prefixes{group_offsets, prefix_lens};
  return attend(check,
                {q, k_pool, v_pool, page_table, seq_lens, query_offsets, scale, sliding_window,
                 soft_cap, k_scales, v_scales},
                &prefixes);
}

}  // namespace

TORCH_LIBRARY_IMPL(stateful_kv, CUDA, m) {
  m.impl("paged_attention", TORCH_FN(paged_attention_cuda));
  m.impl("shared_prefix_attention", TORCH_FN(shared_prefix_attention_cuda));
}

}  // namespace skv::ops
