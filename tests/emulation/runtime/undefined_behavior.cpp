// What code compiled with -fsanitize=... calls when it finds a mistake: instead of the sanitizer's
// own library, which ends the process, the kernel fails with a message like any other mistake.
// The structs are the compiler's side of that interface.
#include <cstdint>

#include "tests/emulation/runtime/emulator.h"

namespace {

struct Location {
  const char* file;
  uint32_t line;
  uint32_t column;
};
struct Type {
  uint16_t kind;
  uint16_t info;
  char name[1];
};
struct TypeMismatch {
  Location location;
  const Type* type;
  unsigned char log_alignment;
  unsigned char kind;
};
struct OutOfBounds {
  Location location;
  const Type* array;
  const Type* index;
};
struct ShiftOutOfBounds {
  Location location;
  const Type* left;
  const Type* right;
};
struct Overflow {
  Location location;
  const Type* type;
};

}  // namespace

extern "C" {

void __ubsan_handle_type_mismatch_v1_abort(const TypeMismatch* data, uintptr_t address) {
  const char* what = address == 0 ? "null pointer" : "misaligned address";
  skv::emulation::fail("%s:%u: %s %p for type %s, which needs %u bytes", data->location.file,
                       data->location.line, what, reinterpret_cast<void*>(address),
                       data->type->name, 1u << data->log_alignment);
}

void __ubsan_handle_out_of_bounds_abort(const OutOfBounds* data, uintptr_t index) {
  skv::emulation::fail("%s:%u: index %lld out of bounds of %s", data->location.file,
                       data->location.line, static_cast<long long>(index), data->array->name);
}

void __ubsan_handle_shift_out_of_bounds_abort(const ShiftOutOfBounds* data, uintptr_t,
                                              uintptr_t by) {
  skv::emulation::fail("%s:%u: shift of %s by %lld", data->location.file, data->location.line,
                       data->left->name, static_cast<long long>(by));
}

void __ubsan_handle_divrem_overflow_abort(const Overflow* data, uintptr_t, uintptr_t) {
  skv::emulation::fail("%s:%u: division of %s by zero, or its overflow", data->location.file,
                       data->location.line, data->type->name);
}

}  // extern "C"
