// Shadow of cuda_fp16.h: the types and the conversions between them.
#pragma once

#include "csrc/kernels/cpu/half.h"
#include "half_types.h"
#include "vector_types.h"

struct __half {
  unsigned short __x;
  static uint16_t round(float x) { return skv::cpu::float_to_half(x); }
  static float widen(uint16_t bits) { return skv::cpu::half_to_float(bits); }
};
struct alignas(4) __half2 {
  __half x, y;
};
using half = __half;
using half2 = __half2;

SKV_PAIR_FUNCTIONS(__half, __half2, half, half2)
inline float2 __half22float2(__half2 x) { return __half22float2_(x); }
