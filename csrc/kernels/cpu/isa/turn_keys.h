// Turns a block of keys around: from one vector of D elements per key to panel[d, key], so that a
// score is one chain over d with a key in each lane. The elements stay as stored; half the bytes
// are half the shuffles.
#pragma once

#include <cstdint>

#include "csrc/kernels/cpu/isa/simd.h"

namespace skv::cpu::SKV_ISA_NS {

inline constexpr int64_t kKeyBlock = 64;  // keys of a panel; divides the chunk

// turn_keys(keys, D, panel, ahead) does so many keys: those at keys[0], keys[1], ... go to panel[d,
// 0], panel[d, 1], ..., with panel rows kKeyBlock elements apart.
inline constexpr int64_t kTurnedKeys = 16;

template <typename Ahead>
SKV_INLINE void turn_keys(const float* const* keys, int64_t head_dim, float* panel, Ahead ahead) {
  auto loop = ahead.begin();
  for (int64_t first = 0; first < kTurnedKeys; first += Vec::kWidth) {
    for (int64_t d = 0; d < head_dim; d += Vec::kWidth) {
      Vec square[Vec::kWidth];
#pragma GCC unroll 16
      for (int i = 0; i < Vec::kWidth; ++i) {
        square[i] = Vec::load(keys[first + i] + d);
        loop.template touch<Vec::kWidth * sizeof(float)>();
      }
      transpose(square);
#pragma GCC unroll 16
      for (int i = 0; i < Vec::kWidth; ++i) square[i].store(panel + (d + i) * kKeyBlock + first);
    }
  }
}

#if defined(__AVX512F__)

// In each 128-bit part apart: 8 vectors of 8 elements of 16 bits are turned around.
SKV_INLINE void transpose_words(__m512i rows[8]) {
  __m512i t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm512_unpacklo_epi16(rows[i], rows[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi16(rows[i], rows[i + 1]);
  }
  __m512i u[8];
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    u[i] = _mm512_unpacklo_epi32(t[i], t[i + 2]);
    u[i + 1] = _mm512_unpackhi_epi32(t[i], t[i + 2]);
    u[i + 2] = _mm512_unpacklo_epi32(t[i + 1], t[i + 3]);
    u[i + 3] = _mm512_unpackhi_epi32(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    rows[2 * i] = _mm512_unpacklo_epi64(u[i], u[4 + i]);
    rows[2 * i + 1] = _mm512_unpackhi_epi64(u[i], u[4 + i]);
  }
}

// 16 elements at a time: key i in the lower half of a register, key 8 + i in the upper.
template <typename Ahead>
SKV_INLINE void turn_keys(const uint16_t* const* keys, int64_t head_dim, uint16_t* panel,
                          Ahead ahead) {
  auto loop = ahead.begin();
  for (int64_t d = 0; d < head_dim; d += 16) {
    __m512i rows[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const auto* low = reinterpret_cast<const __m256i*>(keys[i] + d);
      const auto* high = reinterpret_cast<const __m256i*>(keys[8 + i] + d);
      rows[i] = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256(low)),
                                   _mm256_loadu_si256(high), 1);
      loop.template touch<64>();
    }
    transpose_words(rows);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      // Parts: keys 0-7 at d + i, at d + 8 + i, keys 8-15 at d + i, at d + 8 + i.
      const __m512i pair =
          _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 1, 4, 5, 2, 3, 6, 7), rows[i]);
      uint16_t* to = panel + (d + i) * kKeyBlock;
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_castsi512_si256(pair));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 8 * kKeyBlock),
                          _mm512_extracti64x4_epi64(pair, 1));
    }
  }
}

#elif defined(__AVX2__)

SKV_INLINE void transpose_words(__m256i rows[8]) {
  __m256i t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_epi16(rows[i], rows[i + 1]);
    t[i + 1] = _mm256_unpackhi_epi16(rows[i], rows[i + 1]);
  }
  __m256i u[8];
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    u[i] = _mm256_unpacklo_epi32(t[i], t[i + 2]);
    u[i + 1] = _mm256_unpackhi_epi32(t[i], t[i + 2]);
    u[i + 2] = _mm256_unpacklo_epi32(t[i + 1], t[i + 3]);
    u[i + 3] = _mm256_unpackhi_epi32(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    rows[2 * i] = _mm256_unpacklo_epi64(u[i], u[4 + i]);
    rows[2 * i + 1] = _mm256_unpackhi_epi64(u[i], u[4 + i]);
  }
}

// 8 keys x 16 elements at a time.
template <typename Ahead>
SKV_INLINE void turn_keys(const uint16_t* const* keys, int64_t head_dim, uint16_t* panel,
                          Ahead ahead) {
  auto loop = ahead.begin();
  for (int64_t first = 0; first < kTurnedKeys; first += 8) {
    for (int64_t d = 0; d < head_dim; d += 16) {
      __m256i rows[8];
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        rows[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(keys[first + i] + d));
        loop.template touch<32>();
      }
      transpose_words(rows);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        uint16_t* to = panel + (d + i) * kKeyBlock + first;
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(rows[i]));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 8 * kKeyBlock),
                         _mm256_extracti128_si256(rows[i], 1));
      }
    }
  }
}

#endif

#if defined(__AVX512F__) || defined(__AVX2__)

// One of four levels: rows i and i + 8 are interleaved byte by byte. Four of them turn 16 vectors
// of 16 bytes around.
SKV_INLINE void interleave_bytes(const __m128i from[16], __m128i to[16]) {
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    to[2 * i] = _mm_unpacklo_epi8(from[i], from[i + 8]);
    to[2 * i + 1] = _mm_unpackhi_epi8(from[i], from[i + 8]);
  }
}

// 16 keys x 16 elements at a time.
template <typename Ahead>
SKV_INLINE void turn_keys(const int8_t* const* keys, int64_t head_dim, int8_t* panel, Ahead ahead) {
  auto loop = ahead.begin();
  for (int64_t d = 0; d < head_dim; d += 16) {
    __m128i rows[16];
    __m128i other[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      rows[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(keys[i] + d));
      loop.template touch<16>();
    }
    interleave_bytes(rows, other);
    interleave_bytes(other, rows);
    interleave_bytes(rows, other);
    interleave_bytes(other, rows);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(panel + (d + i) * kKeyBlock), rows[i]);
    }
  }
}

#else

template <typename Element, typename Ahead>
SKV_INLINE void turn_keys(const Element* const* keys, int64_t head_dim, Element* panel,
                          Ahead ahead) {
  auto loop = ahead.begin();
  for (int64_t key = 0; key < kTurnedKeys; ++key) {
    for (int64_t d = 0; d < head_dim; ++d) panel[d * kKeyBlock + key] = keys[key][d];
    for (int64_t d = 0; d < head_dim; d += 16) {
      loop.template touch<16 * sizeof(Element)>();
    }
  }
}

#endif

}  // namespace skv::cpu::SKV_ISA_NS
