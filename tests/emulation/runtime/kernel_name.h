#pragma once

#include <string>

namespace skv::emulation {

// The name in the source of the function at an address, from the symbol table of its library; the
// address itself if that table was removed.
std::string kernel_name(const void* kernel);

}  // namespace skv::emulation
