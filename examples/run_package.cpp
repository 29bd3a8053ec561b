// Runs an AOTInductor package whose model calls ops of stateful_kv, without Python:
//
//   run_package libstateful_kv_ops.so model.pt2 inputs.pt outputs.pt
//
// inputs.pt is a list of tensors written by torch.save; torch.load reads outputs.pt. How to make
// the package and build this program: docs/use-the-ops.md.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <fstream>
#include <iostream>
#include <iterator>
#include <string>
#include <vector>

namespace {

std::vector<at::Tensor> read_tensors(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  std::vector<at::Tensor> tensors;
  const at::IValue list = torch::jit::pickle_load(bytes);
  for (const at::IValue& value : list.toListRef()) tensors.push_back(value.toTensor());
  return tensors;
}

void write_tensors(const std::string& path, const std::vector<at::Tensor>& tensors) {
  const std::vector<at::IValue> values{tensors.begin(), tensors.end()};
  const std::vector<char> bytes = torch::jit::pickle_save(c10::ivalue::Tuple::create(values));
  std::ofstream(path, std::ios::binary).write(bytes.data(), std::ssize(bytes));
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 5) {
    std::cerr << "usage: run_package LIBRARY PACKAGE INPUTS OUTPUTS\n";
    return 2;
  }
  if (dlopen(arguments[1], RTLD_NOW | RTLD_GLOBAL) == nullptr) {  // registers the ops with torch
    std::cerr << "run_package: " << dlerror() << '\n';
    return 1;
  }
  torch::inductor::AOTIModelPackageLoader model(arguments[2]);
  write_tensors(arguments[4], model.run(read_tensors(arguments[3])));
}
