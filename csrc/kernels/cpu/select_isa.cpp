#include "csrc/kernels/cpu/select_isa.h"

#include <cstdlib>
#include <string>

namespace skv::cpu {

namespace generic {
extern const KernelTable kTable;
}
#if defined(SKV_BUILD_X86_ISAS)
namespace avx2 {
extern const KernelTable kTable;
}
namespace avx512 {
extern const KernelTable kTable;
}
#endif

namespace {

struct Candidate {
  const KernelTable* table;
  bool is_supported;
};

std::vector<Candidate> candidates() {
  std::vector<Candidate> list{{&generic::kTable, true}};
#if defined(SKV_BUILD_X86_ISAS)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  list.push_back({&avx2::kTable, has_avx2});
  list.push_back({&avx512::kTable, has_avx512});
#endif
  return list;
}

struct Choice {
  const KernelTable* table;
  std::string error;
};

Choice choose() {
  Choice choice{&generic::kTable, ""};
  for (const Candidate& candidate : candidates()) {
    if (candidate.is_supported) choice.table = candidate.table;
  }
  const char* wanted = std::getenv("STATEFUL_KV_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return choice;
  for (const Candidate& candidate : candidates()) {
    if (std::string_view(candidate.table->isa) == wanted && candidate.is_supported) {
      return {candidate.table, ""};
    }
  }
  choice.error = "STATEFUL_KV_CPU_ISA: expected one of";
  for (std::string_view name : supported_isas()) choice.error.append(" ").append(name);
  choice.error += ", got " + std::string(wanted);
  return choice;
}

const Choice& chosen() {
  static const Choice choice = choose();
  return choice;
}

}  // namespace

const KernelTable& kernels() { return *chosen().table; }

const std::string& isa_error() { return chosen().error; }

std::vector<std::string_view> built_isas() {
  std::vector<std::string_view> names;
  for (const Candidate& candidate : candidates()) names.push_back(candidate.table->isa);
  return names;
}

std::vector<std::string_view> supported_isas() {
  std::vector<std::string_view> names;
  for (const Candidate& candidate : candidates()) {
    if (candidate.is_supported) names.push_back(candidate.table->isa);
  }
  return names;
}

}  // namespace skv::cpu
