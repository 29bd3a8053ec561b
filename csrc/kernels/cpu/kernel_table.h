// The kernels that are built once per instruction set, as a table of function pointers. Files in
// csrc/kernels/cpu/isa/ define them in namespace skv::cpu::SKV_ISA_NS; select_isa.cpp picks a
// table once at load.
#pragma once

#include "csrc/core/parallel_for.h"
#include "csrc/kernels/kv_params.h"
#include "csrc/kernels/params.h"
#include "csrc/kernels/token_params.h"

namespace skv::cpu {

// Logits that share one maximum in block_maxima.
inline constexpr int64_t kSampleBlock = 64;

struct KernelTable {
  const char* isa;
  void (*paged_attention)(const PagedAttentionParams&, ParallelFor);
  void (*quantized_linear)(const QuantizedLinearParams&, ParallelFor);
  void (*linear_top_k)(const LinearTopKParams&, ParallelFor);
  // Slots are -1 or in [0, P * B). Of rows with the same slot the last one stays.
  void (*append_kv)(const AppendKvParams&, ParallelFor);
  // As append_kv; D even; positions within cos_sin, of skipped rows too.
  void (*rope_append_kv)(const RopeAppendKvParams&, ParallelFor);
  // A row has the same bits in any batch. 16-bit activations and logits are widened when they are
  // read; results are rounded once.
  void (*rms_norm)(const RmsNormParams&, ParallelFor);
  void (*silu_mul)(const SiluMulParams&, ParallelFor);
  void (*argmax)(const ArgmaxParams&, ParallelFor);
  // Parts of sample (sample.h), with the same bits on every instruction set.
  // Float16 or bfloat16 to float32.
  void (*widen)(const uint16_t* values, DType dtype, int64_t count, float* wide);
  // Writes the maximum of every kSampleBlock floats (of a block with NaN: any number) and returns
  // the largest of all, NaN if there is one.
  float (*block_maxima)(const float* row, int64_t count, float* maxima);
  // weights[i] = sample_weight(logits[i], ...) of sample_rule.h; logits <= top, no NaN.
  void (*sample_weights)(const float* logits, int64_t count, float top, float inverse_temperature,
                         float* weights);
};

}  // namespace skv::cpu
