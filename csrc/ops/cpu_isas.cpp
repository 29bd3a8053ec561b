#include "csrc/ops/cpu_isas.h"

#include <string_view>

#include "csrc/kernels/cpu/select_isa.h"

namespace skv::ops {

CpuIsas cpu_isas() {
  CpuIsas isas{.built = {}, .used = std::string(cpu::kernels().isa), .error = cpu::isa_error()};
  for (const std::string_view name : cpu::built_isas()) isas.built.emplace_back(name);
  return isas;
}

}  // namespace skv::ops
