// append_kv, rope_append_kv and copy_pages on CUDA: check, launch. Contents of slots,
// positions and page ids are not checked here, which would need a synchronisation.
#include <torch/library.h>

#include "csrc/kernels/cuda/kernels.h"
#include "csrc/ops/checks.h"
#include "csrc/ops/cuda_launch.h"
#include "csrc/ops/kv/args.h"

namespace skv::ops {

namespace {

void append_kv_cuda(const at::Tensor& k, const at::Tensor& v, const at::Tensor& slots,
                    const at::Tensor& k_pool, const at::Tensor& v_pool,
                    const OptionalTensor& k_scales, const OptionalTensor& v_scales) {
  const OpCheck check{"append_kv", k_pool.device()};
  const AppendKvArgs args{k, v, slots, k_pool, v_pool, k_scales, v_scales};
  check_append_kv(check, args);
  launch(check.op(), cuda::append_kv, params_of(args), k_pool);
}

void rope_append_kv_cuda(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                         const at::Tensor& positions, const at::Tensor& cos_sin,
                         const at::Tensor& slots, const at::Tensor& k_pool,
                         const at::Tensor& v_pool, const OptionalTensor& k_scales,
                         const OptionalTensor& v_scales) {
  const OpCheck check{"rope_append_kv", k_pool.device()};
  const RopeAppendKvArgs args{q,     k,      v,      positions, cos_sin,
                              slots, k_pool, v_pool, k_scales,  v_scales};
  check_rope_append_kv(check, args);
  launch(check.op(), cuda::rope_append_kv, params_of(args), k_pool);
}

void copy_pages_cuda(const at::Tensor& page_copies, const at::Tensor& k_pool,
                     const at::Tensor& v_pool, const OptionalTensor& k_scales,
                     const OptionalTensor& v_scales) {
  const OpCheck check{"copy_pages", k_pool.device()};
  const CopyPagesArgs args{page_copies, k_pool, v_pool, k_scales, v_scales};
  check_copy_pages(check, args);
  launch(check.op(), cuda::copy_pages, params_of(args), k_pool);
}

}  // namespace

TORCH_LIBRARY_IMPL(stateful_kv, CUDA, m) {
  m.impl("append_kv", TORCH_FN(append_kv_cuda));
  m.impl("rope_append_kv", TORCH_FN(rope_append_kv_cuda));
  m.impl("copy_pages", TORCH_FN(copy_pages_cuda));
}

}  // namespace skv::ops
