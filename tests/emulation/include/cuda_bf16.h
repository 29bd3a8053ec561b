// Shadow of cuda_bf16.h: the types and the conversions between them.
#pragma once

#include "csrc/kernels/cpu/half.h"
#include "half_types.h"
#include "vector_types.h"

struct __nv_bfloat16 {
  unsigned short __x;
  static uint16_t round(float x) { return skv::cpu::float_to_bfloat16(x); }
  static float widen(uint16_t bits) { return skv::cpu::bfloat16_to_float(bits); }
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
using nv_bfloat16 = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;

SKV_PAIR_FUNCTIONS(__nv_bfloat16, __nv_bfloat162, bfloat16, bfloat162)
inline float2 __bfloat1622float2(__nv_bfloat162 x) { return __bfloat1622float2_(x); }
