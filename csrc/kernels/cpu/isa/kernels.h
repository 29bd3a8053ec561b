// Declarations of the kernels of one instruction set. Each build of isa/*.cpp has its own
// namespace; nothing in these files may be an inline function or template instance shared with
// another build, or the linker could hand AVX-512 code to a CPU without it.
#pragma once

#include "csrc/kernels/cpu/kernel_table.h"

namespace skv::cpu::SKV_ISA_NS {

void paged_attention(const PagedAttentionParams& params, ParallelFor parallel_for);
void quantized_linear(const QuantizedLinearParams& params, ParallelFor parallel_for);
void linear_top_k(const LinearTopKParams& params, ParallelFor parallel_for);
void append_kv(const AppendKvParams& params, ParallelFor parallel_for);
void rope_append_kv(const RopeAppendKvParams& params, ParallelFor parallel_for);
void rms_norm(const RmsNormParams& params, ParallelFor parallel_for);
void silu_mul(const SiluMulParams& params, ParallelFor parallel_for);
void argmax(const ArgmaxParams& params, ParallelFor parallel_for);
void widen(const uint16_t* values, DType dtype, int64_t count, float* wide);
float block_maxima(const float* row, int64_t count, float* maxima);
void sample_weights(const float* logits, int64_t count, float top, float inverse_temperature,
                    float* weights);

}  // namespace skv::cpu::SKV_ISA_NS
