// The kernels that are built once per instruction set, as a table of function pointers. Files in
// csrc/kernels/cpu/isa/ define them in namespace skv::cpu::SKV_ISA_NS; select_isa.cpp picks a
// table once at load.
#pragma once

#include "csrc/core/parallel_for.h"
#include "csrc/kernels/kv_params.h"
#include "csrc/kernels/params.h"
#include "csrc/kernels/token_params.h"

namespace skv::cpu {

struct KernelTable {
  const char* isa;
  void (*paged_attention)(const PagedAttentionParams&, ParallelFor);
  void (*quantized_linear)(const QuantizedLinearParams&, ParallelFor);
  void (*linear_top_k)(const LinearTopKParams&, ParallelFor);
  // Slots are -1 or in [0, P * B). Of rows with the same slot the last one stays.
  void (*append_kv)(const AppendKvParams&, ParallelFor);
  // As append_kv; float32 activations; D even; positions within cos_sin, of skipped rows too.
  void (*rope_append_kv)(const RopeAppendKvParams&, ParallelFor);
  // Float32 activations and logits; a row has the same bits in any batch.
  void (*rms_norm)(const RmsNormParams&, ParallelFor);
  void (*silu_mul)(const SiluMulParams&, ParallelFor);
  void (*argmax)(const ArgmaxParams&, ParallelFor);
};

}  // namespace skv::cpu
