// The instruction sets of the CPU kernels, for build_info.
#pragma once

#include <string>
#include <vector>

#include "csrc/ops/api.h"

namespace skv::ops {

struct CpuIsas {
  std::vector<std::string> built;  // weakest first
  std::string used;
  std::string error;  // empty unless STATEFUL_KV_CPU_ISA names a set that cannot be used
};

SKV_API CpuIsas cpu_isas();

}  // namespace skv::ops
