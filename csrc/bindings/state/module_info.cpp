// What was built, and what of it runs here.
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

#include "csrc/bindings/state/state_objects.h"
#include "csrc/ops/cpu_isas.h"

namespace py = pybind11;

namespace skv::bindings {
namespace {

#ifdef SKV_WITH_CUDA
constexpr bool kHasCuda = true;
constexpr const char* kCudaArchs = SKV_CUDA_ARCHS;
#else
constexpr bool kHasCuda = false;
constexpr const char* kCudaArchs = "";
#endif

std::string compiler_name() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

// Joined by commas: CMake cuts a compile definition in two at a semicolon.
std::vector<std::string> split_list(const std::string& joined) {
  std::vector<std::string> items;
  std::istringstream stream(joined);
  for (std::string item; std::getline(stream, item, ',');) items.push_back(item);
  return items;
}

py::dict build_info() {
  py::dict info;
  info["version"] = SKV_PROJECT_VERSION;
  info["torch"] = SKV_TORCH_VERSION;
  info["compiler"] = compiler_name();
  info["cuda"] = kHasCuda;
  info["cuda_archs"] = split_list(kCudaArchs);
  info["cpu_isas"] = ops::cpu_isas().built;
  return info;
}

}  // namespace

void bind_info(py::module_& module) {
  module.def("build_info", &build_info);
  module.def("cpu_isa", [] { return ops::cpu_isas().used; });
  // Empty unless STATEFUL_KV_CPU_ISA names a set that cannot be used.
  module.def("cpu_isa_error", [] { return ops::cpu_isas().error; });
}

}  // namespace skv::bindings
