// Chooses the instruction set of the CPU kernels once, at the first use.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "csrc/kernels/cpu/kernel_table.h"

namespace skv::cpu {

// The chosen table. The environment variable STATEFUL_KV_CPU_ISA (generic, avx2, avx512)
// overrides the choice; a name that is not built or that this CPU lacks is kept for isa_error()
// and the best set is used.
const KernelTable& kernels();

// Why STATEFUL_KV_CPU_ISA could not be honoured; empty if it was, or is not set.
const std::string& isa_error();

// Names built into this library, weakest first; those this CPU can run.
std::vector<std::string_view> built_isas();
std::vector<std::string_view> supported_isas();

}  // namespace skv::cpu
