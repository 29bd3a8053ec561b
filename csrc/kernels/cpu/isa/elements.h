// Rows of float32, float16 or bfloat16 in memory, for kernels that compute in float32: what they
// read is widened, which is exact, and what they write is rounded once, to nearest even. A float32
// row is read and written in place. The dtype is looked at once a run, never once an element.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "csrc/kernels/cpu/isa/simd.h"
#include "csrc/kernels/params.h"

namespace skv::cpu::SKV_ISA_NS {

// How a stored element type becomes a vector of floats, or one float.
struct LoadFloat32 {
  using Element = float;
  static SKV_INLINE Vec load(const float* p) { return Vec::load(p); }
  static SKV_INLINE float load_one(const float* p) { return *p; }
};
struct LoadFloat16 {
  using Element = uint16_t;
  static SKV_INLINE Vec load(const uint16_t* p) { return Vec::load_half(p); }
  static SKV_INLINE float load_one(const uint16_t* p) { return half_to_float(*p); }
};
struct LoadBFloat16 {
  using Element = uint16_t;
  static SKV_INLINE Vec load(const uint16_t* p) { return Vec::load_bfloat16(p); }
  static SKV_INLINE float load_one(const uint16_t* p) { return bfloat16_to_float(*p); }
};
struct LoadInt8 {
  using Element = int8_t;
  static SKV_INLINE Vec load(const int8_t* p) { return Vec::load_int8(p); }
};

SKV_INLINE int64_t element_size(DType dtype) {
  if (dtype == DType::kInt8) return 1;
  return dtype == DType::kFloat32 ? 4 : 2;
}

// `count` floats to target[at ...], of a float dtype.
SKV_INLINE void store_run(const float* source, int64_t count, void* target, DType dtype,
                          int64_t at) {
  if (dtype == DType::kFloat32) {
    std::memcpy(static_cast<float*>(target) + at, source,
                static_cast<size_t>(count) * sizeof(float));
    return;
  }
  auto* to = static_cast<uint16_t*>(target) + at;
  if (dtype == DType::kFloat16) {
    const int64_t whole = count - count % Vec::kWidth;
    for (int64_t i = 0; i < whole; i += Vec::kWidth) Vec::load(source + i).store_half(to + i);
    for (int64_t i = whole; i < count; ++i) to[i] = float_to_half(source[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = float_to_bfloat16(source[i]);
  }
}

template <typename Load>
SKV_INLINE void widen_run(const typename Load::Element* source, int64_t count, float* target) {
  int64_t i = 0;
  for (; i + Vec::kWidth <= count; i += Vec::kWidth) Load::load(source + i).store(target + i);
  for (; i < count; ++i) target[i] = Load::load_one(source + i);
}

// Elements of a row that are widened or rounded together; they stay in the first-level cache. A
// multiple of every vector width: only the last run of a row has a tail.
inline constexpr int64_t kRunLength = 256;

// A row that is read.
struct Row {
  const void* data;
  DType dtype;  // not kInt8

  Row from(int64_t at) const {
    return {static_cast<const char*>(data) + at * element_size(dtype), dtype};
  }

  // Calls visit.template operator()<Load>(elements).
  template <typename Visit>
  SKV_INLINE auto dispatch(Visit&& visit) const {
    if (dtype == DType::kFloat32) {
      return visit.template operator()<LoadFloat32>(static_cast<const float*>(data));
    }
    const auto* elements = static_cast<const uint16_t*>(data);
    if (dtype == DType::kFloat16) return visit.template operator()<LoadFloat16>(elements);
    return visit.template operator()<LoadBFloat16>(elements);
  }

  void copy_to(float* target, int64_t count) const {
    dispatch([&]<typename Load>(const typename Load::Element* elements) {
      widen_run<Load>(elements, count, target);
    });
  }

  // The first `count` elements as floats: in place if they are floats, else in scratch.
  const float* floats(int64_t count, float* scratch) const {
    if (dtype == DType::kFloat32) return static_cast<const float*>(data);
    copy_to(scratch, count);
    return scratch;
  }
};

// A row that is written.
struct OutputRow {
  void* data;
  DType dtype;  // not kInt8

  // Where results from `at` on are to be computed: in place if they stay floats, else in scratch.
  float* place(int64_t at, float* scratch) const {
    return dtype == DType::kFloat32 ? static_cast<float*>(data) + at : scratch;
  }
  // After that, rounds them into the row.
  void finish(const float* results, int64_t at, int64_t count) const {
    if (dtype != DType::kFloat32) store_run(results, count, data, dtype, at);
  }
};

// Calls visit(at, size) for runs [at, at + size) of `count` elements.
template <typename Visit>
SKV_INLINE void for_runs(int64_t count, Visit&& visit) {
  for (int64_t at = 0; at < count; at += kRunLength) visit(at, std::min(kRunLength, count - at));
}

// sums[i] += x[i].
inline void add_row(float* sums, const Row& x, int64_t count) {
  float wide[kRunLength];
  for_runs(count, [&](int64_t at, int64_t size) {
    const float* values = x.from(at).floats(size, wide);
    for (int64_t i = 0; i < size; ++i) sums[at + i] += values[i];
  });
}

}  // namespace skv::cpu::SKV_ISA_NS
