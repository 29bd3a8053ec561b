#include "tests/emulation/runtime/kernel_name.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>
#include <link.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <vector>

namespace skv::emulation {

namespace {

std::vector<char> read_file(const char* path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

// Kernels are local symbols, which dladdr does not know: look them up in the full table.
std::string symbol_at(const std::vector<char>& file, uintptr_t offset) {
  if (file.size() < sizeof(ElfW(Ehdr))) return {};
  const auto* header = reinterpret_cast<const ElfW(Ehdr)*>(file.data());
  const auto* sections = reinterpret_cast<const ElfW(Shdr)*>(file.data() + header->e_shoff);
  for (int i = 0; i < header->e_shnum; ++i) {
    const ElfW(Shdr) & section = sections[i];
    if (section.sh_type != SHT_SYMTAB) continue;
    const auto* symbols = reinterpret_cast<const ElfW(Sym)*>(file.data() + section.sh_offset);
    const char* names = file.data() + sections[section.sh_link].sh_offset;
    for (size_t k = 0; k < section.sh_size / sizeof(ElfW(Sym)); ++k) {
      const bool is_function = (symbols[k].st_info & 0xf) == STT_FUNC;
      if (is_function && symbols[k].st_value == offset) return names + symbols[k].st_name;
    }
  }
  return {};
}

std::string demangle(const std::string& symbol) {
  int status = 0;
  char* readable = abi::__cxa_demangle(symbol.c_str(), nullptr, nullptr, &status);
  std::string result = status == 0 ? readable : symbol;
  std::free(readable);
  const std::string place = "skv::cuda::(anonymous namespace)::";
  for (size_t at = result.find(place); at != std::string::npos; at = result.find(place)) {
    result.erase(at, place.size());
  }
  return result.substr(0, result.rfind('('));
}

}  // namespace

std::string kernel_name(const void* kernel) {
  Dl_info library{};
  if (dladdr(kernel, &library) != 0) {
    const auto offset =
        reinterpret_cast<uintptr_t>(kernel) - reinterpret_cast<uintptr_t>(library.dli_fbase);
    const std::string symbol = symbol_at(read_file(library.dli_fname), offset);
    if (!symbol.empty()) return demangle(symbol);
  }
  char address[32];
  std::snprintf(address, sizeof address, "%p", kernel);
  return address;
}

}  // namespace skv::emulation
