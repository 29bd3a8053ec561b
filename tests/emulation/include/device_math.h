// Shadow of CUDA's device arithmetic. Functions that CUDA computes in hardware with an error of its
// own (exp2f, __expf) are the C library's here. cuda_runtime.h includes it.
#pragma once

#include <math.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

// ---- Smallest and largest; of floats NaN loses, as on the device.

template <typename A, typename B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) {
    return std::fmin(static_cast<T>(a), static_cast<T>(b));
  } else {
    return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
  }
}
template <typename A, typename B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) {
    return std::fmax(static_cast<T>(a), static_cast<T>(b));
  } else {
    return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
  }
}

// ---- Floats

inline float __expf(float x) { return ::expf(x); }
inline float __logf(float x) { return ::logf(x); }
inline float rsqrtf(float x) { return 1.0f / ::sqrtf(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return ::sqrtf(a); }
inline float __fmaf_rn(float a, float b, float c) { return ::fmaf(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline float __saturatef(float x) { return ::fminf(::fmaxf(x, 0.0f), 1.0f); }

// ---- Bits of a float

inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }

// ---- Float to integer: the device saturates, and NaN is 0 (2^63 for 64 bits).

namespace skv::emulation {

template <typename Integer, typename Float>
Integer to_integer(Float rounded) {
  using Limits = std::numeric_limits<Integer>;
  if (std::isnan(rounded)) {
    return sizeof(Integer) < 8 ? Integer{0} : static_cast<Integer>(uint64_t{1} << 63);
  }
  if (rounded <= static_cast<Float>(Limits::min())) return Limits::min();
  if (rounded >= static_cast<Float>(Limits::max())) return Limits::max();
  return static_cast<Integer>(rounded);
}

}  // namespace skv::emulation

// Suffixes: rn to nearest even, rz towards zero, rd down, ru up.
#define SKV_TO_INTEGER(Float, float_name, Integer, integer_name)   \
  inline Integer __##float_name##2##integer_name##_rn(Float x) {   \
    return skv::emulation::to_integer<Integer>(std::nearbyint(x)); \
  }                                                                \
  inline Integer __##float_name##2##integer_name##_rz(Float x) {   \
    return skv::emulation::to_integer<Integer>(std::trunc(x));     \
  }                                                                \
  inline Integer __##float_name##2##integer_name##_rd(Float x) {   \
    return skv::emulation::to_integer<Integer>(std::floor(x));     \
  }                                                                \
  inline Integer __##float_name##2##integer_name##_ru(Float x) {   \
    return skv::emulation::to_integer<Integer>(std::ceil(x));      \
  }
SKV_TO_INTEGER(float, float, int, int)
SKV_TO_INTEGER(float, float, unsigned, uint)
SKV_TO_INTEGER(float, float, long long, ll)
SKV_TO_INTEGER(float, float, unsigned long long, ull)
SKV_TO_INTEGER(double, double, int, int)
SKV_TO_INTEGER(double, double, unsigned, uint)
SKV_TO_INTEGER(double, double, long long, ll)
SKV_TO_INTEGER(double, double, unsigned long long, ull)
#undef SKV_TO_INTEGER

inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
inline float __ll2float_rn(long long x) { return static_cast<float>(x); }
inline float __ull2float_rn(unsigned long long x) { return static_cast<float>(x); }
inline double __ll2double_rn(long long x) { return static_cast<double>(x); }
inline double __ull2double_rn(unsigned long long x) { return static_cast<double>(x); }
inline float __double2float_rn(double x) { return static_cast<float>(x); }

// ---- Integers

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
  unsigned result = 0;
  for (int bit = 0; bit < 32; ++bit) result |= (x >> bit & 1u) << (31 - bit);
  return result;
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(uint64_t{a} * b >> 32);
}
inline int __mulhi(int a, int b) { return static_cast<int>(int64_t{a} * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned from = selector >> 4 * i & 0x7u;
    unsigned byte = static_cast<unsigned>(bytes >> 8 * from & 0xff);
    if ((selector >> 4 * i & 0x8u) != 0) byte = (byte & 0x80u) != 0 ? 0xff : 0;  // its sign
    result |= byte << 8 * i;
  }
  return result;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>(((uint64_t{high} << 32 | low) << (shift & 31)) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) >> (shift & 31));
}
