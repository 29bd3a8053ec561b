// append_kv, rope_append_kv and copy_pages of tensors without memory: what tracing checks.
#include <torch/library.h>

#include "csrc/ops/checks.h"
#include "csrc/ops/kv/args.h"

namespace skv::ops {

namespace {

void append_kv_meta(const at::Tensor& k, const at::Tensor& v, const at::Tensor& slots,
                    const at::Tensor& k_pool, const at::Tensor& v_pool,
                    const OptionalTensor& k_scales, const OptionalTensor& v_scales) {
  check_append_kv({"append_kv", k_pool.device()},
                  {k, v, slots, k_pool, v_pool, k_scales, v_scales});
}

void rope_append_kv_meta(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                         const at::Tensor& positions, const at::Tensor& cos_sin,
                         const at::Tensor& slots, const at::Tensor& k_pool,
                         const at::Tensor& v_pool, const OptionalTensor& k_scales,
                         const OptionalTensor& v_scales) {
  check_rope_append_kv({"rope_append_kv", k_pool.device()},
                       {q, k, v, positions, cos_sin, slots, k_pool, v_pool, k_scales, v_scales});
}

void copy_pages_meta(const at::Tensor& page_copies, const at::Tensor& k_pool,
                     const at::Tensor& v_pool, const OptionalTensor& k_scales,
                     const OptionalTensor& v_scales) {
  check_copy_pages({"copy_pages", k_pool.device()},
                   {page_copies, k_pool, v_pool, k_scales, v_scales});
}

}  // namespace

TORCH_LIBRARY_IMPL(stateful_kv, Meta, m) {
  m.impl("append_kv", TORCH_FN(append_kv_meta));
  m.impl("rope_append_kv", TORCH_FN(rope_append_kv_meta));
  m.impl("copy_pages", TORCH_FN(copy_pages_meta));
}

}  // namespace skv::ops
