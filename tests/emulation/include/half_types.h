// What cuda_fp16.h and cuda_bf16.h have in common: arithmetic on pairs, done in fp32 or wider and
// rounded once.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace skv::emulation {

// The device makes every NaN this one when it rounds to 16 bits.
inline constexpr uint16_t kNan16 = 0x7FFF;

}  // namespace skv::emulation

// Element, pair and their names in CUDA's functions: (__half, __half2, half, half2) or
// (__nv_bfloat16, __nv_bfloat162, bfloat16, bfloat162).
#define SKV_PAIR_FUNCTIONS(Element, Pair, element, pair)                                   \
  inline Element __float2##element##_rn(float x) {                                         \
    return std::isnan(x) ? Element{skv::emulation::kNan16} : Element{Element::round(x)};   \
  }                                                                                        \
  inline Element __float2##element(float x) { return __float2##element##_rn(x); }          \
  inline float __##element##2float(Element x) { return Element::widen(x.__x); }            \
  inline Pair __floats2##pair##_rn(float x, float y) {                                     \
    return {__float2##element##_rn(x), __float2##element##_rn(y)};                         \
  }                                                                                        \
  inline Pair __float22##pair##_rn(float2 x) { return __floats2##pair##_rn(x.x, x.y); }    \
  inline Pair __float2##pair##_rn(float x) { return __floats2##pair##_rn(x, x); }          \
  inline float2 __##pair##2float2_(Pair x) {                                               \
    return {__##element##2float(x.x), __##element##2float(x.y)};                           \
  }                                                                                        \
  inline Pair __##element##2##pair(Element x) { return {x, x}; }                           \
  inline Pair __halves2##pair(Element x, Element y) { return {x, y}; }                     \
  inline float __low2float(Pair x) { return __##element##2float(x.x); }                    \
  inline float __high2float(Pair x) { return __##element##2float(x.y); }                   \
  inline Element __low2##element(Pair x) { return x.x; }                                   \
  inline Element __high2##element(Pair x) { return x.y; }                                  \
  inline Element __hadd(Element a, Element b) {                                            \
    return __float2##element##_rn(__##element##2float(a) + __##element##2float(b));        \
  }                                                                                        \
  inline Element __hsub(Element a, Element b) {                                            \
    return __float2##element##_rn(__##element##2float(a) - __##element##2float(b));        \
  }                                                                                        \
  inline Element __hmul(Element a, Element b) {                                            \
    return __float2##element##_rn(__##element##2float(a) * __##element##2float(b));        \
  }                                                                                        \
  inline Element __hfma(Element a, Element b, Element c) {                                 \
    return __float2##element##_rn(                                                         \
        std::fma(__##element##2float(a), __##element##2float(b), __##element##2float(c))); \
  }                                                                                        \
  inline Pair __hadd2(Pair a, Pair b) { return {__hadd(a.x, b.x), __hadd(a.y, b.y)}; }     \
  inline Pair __hsub2(Pair a, Pair b) { return {__hsub(a.x, b.x), __hsub(a.y, b.y)}; }     \
  inline Pair __hmul2(Pair a, Pair b) { return {__hmul(a.x, b.x), __hmul(a.y, b.y)}; }     \
  inline Pair __hfma2(Pair a, Pair b, Pair c) {                                            \
    return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)};                                 \
  }                                                                                        \
  inline unsigned short __##element##_as_ushort(Element x) { return x.__x; }               \
  inline short __##element##_as_short(Element x) { return static_cast<short>(x.__x); }     \
  inline Element __ushort_as_##element(unsigned short x) { return {x}; }                   \
  inline Element __short_as_##element(short x) { return {static_cast<unsigned short>(x)}; }
