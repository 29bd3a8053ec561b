// A vector of floats of this instruction set's natural width, and the few operations the kernels
// need. Every fused multiply-add is written as fma(); the compiler may not contract (built with
// -ffp-contract=off), so the bits of a result follow from the source alone.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "csrc/kernels/cpu/half.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#define SKV_INLINE __attribute__((always_inline)) inline

namespace skv::cpu::SKV_ISA_NS {

#if defined(__AVX512F__)

struct Vec {
  static constexpr int kWidth = 16;
  __m512 v;

  static SKV_INLINE Vec zero() { return {_mm512_setzero_ps()}; }
  static SKV_INLINE Vec set1(float x) { return {_mm512_set1_ps(x)}; }
  static SKV_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static SKV_INLINE Vec load_half(const uint16_t* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  static SKV_INLINE Vec load_bfloat16(const uint16_t* p) {
    const __m512i wide =
        _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
  }
  // kWidth signed bytes.
  static SKV_INLINE Vec load_int8(const int8_t* p) {
    return {_mm512_cvtepi32_ps(
        _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
  }
  // kWidth bytes of two 4-bit values each: low nibbles and high nibbles.
  static SKV_INLINE void load_nibbles(const uint8_t* p, Vec& low, Vec& high) {
    const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    low = {_mm512_cvtepi32_ps(_mm512_and_si512(wide, _mm512_set1_epi32(15)))};
    high = {_mm512_cvtepi32_ps(_mm512_srli_epi32(wide, 4))};
  }
  SKV_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
  // Integral values in [-128, 127].
  SKV_INLINE void store_int8(int8_t* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
  }
  SKV_INLINE void store_half(uint16_t* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
};

SKV_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
SKV_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
SKV_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
SKV_INLINE Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
SKV_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
SKV_INLINE Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
SKV_INLINE Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
SKV_INLINE Vec round_to_int(Vec a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// x * 2^n for integral n in [-126, 127]; n = 128 gives infinity.
SKV_INLINE Vec scale_by_power_of_two(Vec x, Vec n) {
  const __m512i bits =
      _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127)), 23);
  return {_mm512_mul_ps(x.v, _mm512_castsi512_ps(bits))};
}
// a where x < bound, else b (also for NaN x).
SKV_INLINE Vec select_less(Vec x, Vec bound, Vec a, Vec b) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.v, bound.v, _CMP_LT_OQ), b.v, a.v)};
}

#elif defined(__AVX2__)

struct Vec {
  static constexpr int kWidth = 8;
  __m256 v;

  static SKV_INLINE Vec zero() { return {_mm256_setzero_ps()}; }
  static SKV_INLINE Vec set1(float x) { return {_mm256_set1_ps(x)}; }
  static SKV_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static SKV_INLINE Vec load_half(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  static SKV_INLINE Vec load_bfloat16(const uint16_t* p) {
    const __m256i wide =
        _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
  }
  static SKV_INLINE Vec load_int8(const int8_t* p) {
    return {_mm256_cvtepi32_ps(
        _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
  }
  static SKV_INLINE void load_nibbles(const uint8_t* p, Vec& low, Vec& high) {
    const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    low = {_mm256_cvtepi32_ps(_mm256_and_si256(wide, _mm256_set1_epi32(15)))};
    high = {_mm256_cvtepi32_ps(_mm256_srli_epi32(wide, 4))};
  }
  SKV_INLINE void store(float* p) const { _mm256_storeu_ps(p, v); }
  SKV_INLINE void store_int8(int8_t* p) const {
    const __m256i wide = _mm256_cvtps_epi32(v);
    const __m128i words =
        _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
  }
  SKV_INLINE void store_half(uint16_t* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
};

SKV_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
SKV_INLINE Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
SKV_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
SKV_INLINE Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
SKV_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
SKV_INLINE Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
SKV_INLINE Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
SKV_INLINE Vec round_to_int(Vec a) {
  return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
SKV_INLINE Vec scale_by_power_of_two(Vec x, Vec n) {
  const __m256i bits =
      _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23);
  return {_mm256_mul_ps(x.v, _mm256_castsi256_ps(bits))};
}
SKV_INLINE Vec select_less(Vec x, Vec bound, Vec a, Vec b) {
  return {_mm256_blendv_ps(b.v, a.v, _mm256_cmp_ps(x.v, bound.v, _CMP_LT_OQ))};
}

#else

// Any 64-bit target: four lanes through the compiler's vector types, no instruction set assumed.
struct Vec {
  static constexpr int kWidth = 4;
  using Lanes = float __attribute__((vector_size(16)));
  Lanes v;

  template <typename Lane>
  static SKV_INLINE Vec make(Lane lane) {
    return {Lanes{lane(0), lane(1), lane(2), lane(3)}};
  }
  static SKV_INLINE Vec zero() { return {Lanes{}}; }
  static SKV_INLINE Vec set1(float x) { return {Lanes{x, x, x, x}}; }
  static SKV_INLINE Vec load(const float* p) {
    Vec result;
    std::memcpy(&result.v, p, sizeof(result.v));
    return result;
  }
  static SKV_INLINE Vec load_half(const uint16_t* p) {
    return make([p](int i) { return half_to_float(p[i]); });
  }
  static SKV_INLINE Vec load_bfloat16(const uint16_t* p) {
    return make([p](int i) { return bfloat16_to_float(p[i]); });
  }
  static SKV_INLINE Vec load_int8(const int8_t* p) {
    return make([p](int i) { return static_cast<float>(p[i]); });
  }
  static SKV_INLINE void load_nibbles(const uint8_t* p, Vec& low, Vec& high) {
    low = make([p](int i) { return static_cast<float>(p[i] & 15); });
    high = make([p](int i) { return static_cast<float>(p[i] >> 4); });
  }
  SKV_INLINE void store(float* p) const { std::memcpy(p, &v, sizeof(v)); }
  SKV_INLINE void store_int8(int8_t* p) const {
    for (int i = 0; i < kWidth; ++i) p[i] = static_cast<int8_t>(v[i]);
  }
  SKV_INLINE void store_half(uint16_t* p) const {
    for (int i = 0; i < kWidth; ++i) p[i] = float_to_half(v[i]);
  }
};

SKV_INLINE Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
SKV_INLINE Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
SKV_INLINE Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
SKV_INLINE Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
// Two roundings: the baseline has no fused instruction, and a library call a lane would be slow.
SKV_INLINE Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
SKV_INLINE Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
SKV_INLINE Vec min(Vec a, Vec b) { return {a.v < b.v ? a.v : b.v}; }
SKV_INLINE Vec round_to_int(Vec a) {
  return Vec::make([a](int i) { return std::nearbyintf(a.v[i]); });
}
SKV_INLINE Vec scale_by_power_of_two(Vec x, Vec n) {
  return Vec::make([x, n](int i) {
    const auto bits = static_cast<uint32_t>(static_cast<int32_t>(n.v[i]) + 127) << 23;
    return x.v[i] * std::bit_cast<float>(bits);
  });
}
SKV_INLINE Vec select_less(Vec x, Vec bound, Vec a, Vec b) { return {x.v < bound.v ? a.v : b.v}; }

#endif

// e^x by 2^n * e^r with r in [-ln2/2, ln2/2] and a degree-6 Taylor polynomial (Cephes' argument
// reduction): relative error below 3e-7. Below -87.33 (the smallest normal result) the answer is
// exactly 0, above 88.37 infinity. NaN stays NaN.
SKV_INLINE Vec exp(Vec x) {
  const Vec lowest = Vec::set1(-87.33F);
  // Operand order matters: max/min return the second operand if one is NaN.
  const Vec bounded = min(Vec::set1(89.0F), max(lowest, x));
  const Vec n = round_to_int(bounded * Vec::set1(1.44269504F));
  Vec r = fma(n, Vec::set1(-0.693359375F), bounded);
  r = fma(n, Vec::set1(2.12194440e-4F), r);
  Vec y = Vec::set1(1.0F / 720.0F);
  y = fma(y, r, Vec::set1(1.0F / 120.0F));
  y = fma(y, r, Vec::set1(1.0F / 24.0F));
  y = fma(y, r, Vec::set1(1.0F / 6.0F));
  y = fma(y, r, Vec::set1(0.5F));
  y = fma(y, r, Vec::set1(1.0F));
  y = fma(y, r, Vec::set1(1.0F));
  return select_less(x, lowest, Vec::zero(), scale_by_power_of_two(y, n));
}

// 1 - 2 / (e^(2x) + 1), which would cancel near 0: below 0.625 Cephes' odd polynomial instead.
SKV_INLINE Vec tanh(Vec x) {
  const Vec one = Vec::set1(1.0F);
  const Vec two = Vec::set1(2.0F);
  const Vec far = one - two / (exp(two * x) + one);
  const Vec z = x * x;
  Vec y = Vec::set1(-5.70498872745e-3F);
  y = fma(y, z, Vec::set1(2.06390887954e-2F));
  y = fma(y, z, Vec::set1(-5.37397155531e-2F));
  y = fma(y, z, Vec::set1(1.33314422036e-1F));
  y = fma(y, z, Vec::set1(-3.33332819422e-1F));
  const Vec near = fma(y * z, x, x);
  return select_less(max(x, Vec::zero() - x), Vec::set1(0.625F), near, far);
}

// Sum and maximum over the lanes, by a fixed tree (lane i meets lane i + width/2).
SKV_INLINE float reduce_add(Vec x) {
  float lane[Vec::kWidth];
  x.store(lane);
  for (int half = Vec::kWidth / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  }
  return lane[0];
}
SKV_INLINE float reduce_max(Vec x) {
  float lane[Vec::kWidth];
  x.store(lane);
  float result = lane[0];
  for (int i = 1; i < Vec::kWidth; ++i) result = lane[i] > result ? lane[i] : result;
  return result;
}

// Turns kWidth vectors of kWidth floats around: lane j of rows[i] becomes lane i of rows[j].
#if defined(__AVX512F__)
SKV_INLINE void transpose(Vec rows[16]) {
  __m512 t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(rows[i].v, rows[i + 1].v);
    t[i + 1] = _mm512_unpackhi_ps(rows[i].v, rows[i + 1].v);
  }
  __m512 u[16];
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    u[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
    u[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xEE);
    u[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    u[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
  }
  // u[4 * b + c] holds, in its 128-bit part a, column 4 * a + c of rows 4 * b ... 4 * b + 3.
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512 low01 = _mm512_shuffle_f32x4(u[c], u[4 + c], 0x88);
    const __m512 high01 = _mm512_shuffle_f32x4(u[c], u[4 + c], 0xDD);
    const __m512 low23 = _mm512_shuffle_f32x4(u[8 + c], u[12 + c], 0x88);
    const __m512 high23 = _mm512_shuffle_f32x4(u[8 + c], u[12 + c], 0xDD);
    rows[c].v = _mm512_shuffle_f32x4(low01, low23, 0x88);
    rows[4 + c].v = _mm512_shuffle_f32x4(high01, high23, 0x88);
    rows[8 + c].v = _mm512_shuffle_f32x4(low01, low23, 0xDD);
    rows[12 + c].v = _mm512_shuffle_f32x4(high01, high23, 0xDD);
  }
}
#elif defined(__AVX2__)
SKV_INLINE void transpose(Vec rows[8]) {
  __m256 t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(rows[i].v, rows[i + 1].v);
    t[i + 1] = _mm256_unpackhi_ps(rows[i].v, rows[i + 1].v);
  }
  __m256 u[8];
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xEE);
    u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    rows[c].v = _mm256_permute2f128_ps(u[c], u[4 + c], 0x20);
    rows[4 + c].v = _mm256_permute2f128_ps(u[c], u[4 + c], 0x31);
  }
}
#else
SKV_INLINE void transpose(Vec rows[4]) {
  for (int i = 0; i < 4; ++i) {
    for (int j = i + 1; j < 4; ++j) {
      const float other = rows[i].v[j];
      rows[i].v[j] = rows[j].v[i];
      rows[j].v[i] = other;
    }
  }
}
#endif

}  // namespace skv::cpu::SKV_ISA_NS
