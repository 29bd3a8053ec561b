// Draws a token from each row of logits by the rule of csrc/kernels/sample_rule.h.
#pragma once

#include <cstdint>

#include "csrc/core/parallel_for.h"
#include "csrc/kernels/token_params.h"

namespace skv::cpu {

// Bytes of memory that one row at a time needs.
int64_t sample_scratch_bytes(int64_t vocab_size);

// `scratch` has num_slots * sample_scratch_bytes(V) bytes, 16-byte aligned; num_slots >= 1 rows are
// worked on at a time. A row's result depends on its own logits and parameters only.
void sample(const SampleParams& params, void* scratch, int64_t num_slots, ParallelFor parallel_for);

}  // namespace skv::cpu
