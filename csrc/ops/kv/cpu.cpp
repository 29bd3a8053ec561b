// CPU kernels of append_kv, rope_append_kv and copy_pages: check values, launch.
#include <torch/library.h>

#include "csrc/kernels/cpu/copy_pages.h"
#include "csrc/kernels/cpu/select_isa.h"
#include "csrc/ops/checks.h"
#include "csrc/ops/kv/args.h"
#include "csrc/ops/kv/checks.h"
#include "csrc/ops/torch_shim.h"

namespace skv::ops {

namespace {

void append_kv_cpu(const at::Tensor& k, const at::Tensor& v, const at::Tensor& slots,
                   const at::Tensor& k_pool, const at::Tensor& v_pool,
                   const OptionalTensor& k_scales, const OptionalTensor& v_scales) {
  const OpCheck check{"append_kv", k_pool.device()};
  const AppendKvArgs args{k, v, slots, k_pool, v_pool, k_scales, v_scales};
  check_append_kv(check, args);
  const AppendKvParams params = params_of(args);
  check_slot_values(check, slots, params.layout);
  cpu::kernels().append_kv(params, torch_parallel_for);
}

void rope_append_kv_cpu(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                        const at::Tensor& positions, const at::Tensor& cos_sin,
                        const at::Tensor& slots, const at::Tensor& k_pool, const at::Tensor& v_pool,
                        const OptionalTensor& k_scales, const OptionalTensor& v_scales) {
  const OpCheck check{"rope_append_kv", k_pool.device()};
  const RopeAppendKvArgs args{q,     k,      v,      positions, cos_sin,
                              slots, k_pool, v_pool, k_scales,  v_scales};
  check_rope_append_kv(check, args);
  const RopeAppendKvParams params = params_of(args);
  check_slot_values(check, slots, params.layout);
  check_positions(check, positions, cos_sin.size(0));
  cpu::kernels().rope_append_kv(params, torch_parallel_for);
}

void check_page_copies(const OpCheck& check, const at::Tensor& page_copies, int64_t num_pages) {
  const int32_t* pages = page_copies.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < page_copies.numel(); ++i) {
    TORCH_CHECK_VALUE(pages[i] >= 0 && pages[i] < num_pages, check.op(),
                      ": page_copies: expected page ids in [0, P = ", num_pages, "), got ",
                      pages[i], " in row ", i / 2);
  }
}

void copy_pages_cpu(const at::Tensor& page_copies, const at::Tensor& k_pool,
                    const at::Tensor& v_pool, const OptionalTensor& k_scales,
                    const OptionalTensor& v_scales) {
  const OpCheck check{"copy_pages", k_pool.device()};
  const CopyPagesArgs args{page_copies, k_pool, v_pool, k_scales, v_scales};
  check_copy_pages(check, args);
  const CopyPagesParams params = params_of(args);
  check_page_copies(check, page_copies, params.num_pages);
  cpu::copy_pages(params, torch_parallel_for);
}

}  // namespace

TORCH_LIBRARY_IMPL(stateful_kv, CPU, m) {
  m.impl("append_kv", TORCH_FN(append_kv_cpu));
  m.impl("rope_append_kv", TORCH_FN(rope_append_kv_cpu));
  m.impl("copy_pages", TORCH_FN(copy_pages_cpu));
}

}  // namespace skv::ops
