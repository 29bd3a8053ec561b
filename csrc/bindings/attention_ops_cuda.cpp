// paged_attention on CUDA: check what CUDA alone wants, launch. Contents of the page table and the
// lengths are not checked here, which would need a synchronisation.
#include <torch/library.h>

#include <cstdint>
#include <string>
#include <utility>

#include "csrc/bindings/attention_args.h"
#include "csrc/bindings/checks.h"
#include "csrc/bindings/cuda_launch.h"
#include "csrc/bindings/kv_checks.h"
#include "csrc/bindings/torch_shim.h"
#include "csrc/kernels/cuda/kernels.h"

namespace skv::bindings {

namespace {

template <int... kDims>
void check_head_dim(const OpCheck& check, int64_t head_dim, std::integer_sequence<int, kDims...>) {
  std::string available;
  ((available += (available.empty() ? "" : ", ") + std::to_string(kDims)), ...);
  check.value("k_pool", ((head_dim == kDims) || ...), "a head_dim that is built: " + available,
              head_dim);
}

at::Tensor paged_attention_cuda(const at::Tensor& q, const at::Tensor& k_pool,
                                const at::Tensor& v_pool, const at::Tensor& page_table,
                                const at::Tensor& seq_lens, const at::Tensor& query_offsets,
                                double scale, int64_t sliding_window, double soft_cap,
                                const OptionalTensor& k_scales, const OptionalTensor& v_scales) {
  const OpCheck check{"paged_attention", q.device()};
  const PagedAttentionArgs args{q,        k_pool,        v_pool,  page_table,
                                seq_lens, query_offsets, scale,   sliding_window,
                                soft_cap, k_scales,      v_scales};
  check("k_pool", k_pool).dtype(kPoolDtypes);  // int8 is not built yet
  const KvLayout layout = check_pools(check, k_pool, v_pool);
  check_head_dim(check, layout.head_dim, cuda::HeadDims{});
  check_pool_alignment(check, "k_pool", k_pool);
  check_pool_alignment(check, "v_pool", v_pool);
  check_paged_attention(check, args, layout, kPoolDtypes);
  const int64_t num_positions = page_table.size(1) * layout.page_size;
  check.value("page_table", num_positions <= cuda::kMaxPositions,
              "M * B to be at most " + std::to_string(cuda::kMaxPositions), num_positions);
  const at::Tensor output = empty_tensor({q.size(0), q.size(1), q.size(2)}, q.scalar_type(), q);
  launch(check.op(), cuda::paged_attention, params_of(args, layout, output), q);
  return output;
}

}  // namespace

TORCH_LIBRARY_IMPL(stateful_kv, CUDA, m) {
  m.impl("paged_attention", TORCH_FN(paged_attention_cuda));
}

}  // namespace skv::bindings
