// The table of this instruction set (compiled once for each).
#include "csrc/kernels/cpu/isa/kernels.h"

namespace skv::cpu::SKV_ISA_NS {

#define SKV_STRING_(x) #x
#define SKV_STRING(x) SKV_STRING_(x)

extern const KernelTable kTable;
const KernelTable kTable{
    .isa = SKV_STRING(SKV_ISA_NS),
    .paged_attention = &paged_attention,
    .quantized_linear = &quantized_linear,
    .linear_top_k = &linear_top_k,
    .append_kv = &append_kv,
    .rope_append_kv = &rope_append_kv,
    .rms_norm = &rms_norm,
    .silu_mul = &silu_mul,
    .argmax = &argmax,
    .widen = &widen,
    .block_maxima = &block_maxima,
    .sample_weights = &sample_weights,
};

}  // namespace skv::cpu::SKV_ISA_NS
