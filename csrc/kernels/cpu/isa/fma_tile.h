// The register tile of attention: Rows x Vecs chains of fused multiply-adds over `length` steps,
//   out[row, c] (+)= sum over i of x[row * x_row_stride + i] * panel[i * panel_stride + c],
// each chain in ascending i. How the rows are cut into tiles never changes a chain.
#pragma once

#include "csrc/kernels/cpu/isa/simd.h"

namespace skv::cpu::SKV_ISA_NS {

// How a stored element type becomes a vector of floats.
struct LoadFloat32 {
  using Element = float;
  static SKV_INLINE Vec load(const float* p) { return Vec::load(p); }
};
struct LoadFloat16 {
  using Element = uint16_t;
  static SKV_INLINE Vec load(const uint16_t* p) { return Vec::load_half(p); }
};
struct LoadBFloat16 {
  using Element = uint16_t;
  static SKV_INLINE Vec load(const uint16_t* p) { return Vec::load_bfloat16(p); }
};

#if defined(__AVX512F__)
inline constexpr int kFmaTileRows = 8;
inline constexpr int kFmaTileVecs = 2;
#elif defined(__AVX2__)
inline constexpr int kFmaTileRows = 6;
inline constexpr int kFmaTileVecs = 2;
#else
inline constexpr int kFmaTileRows = 4;
inline constexpr int kFmaTileVecs = 2;
#endif

struct FmaTile {
  const float* x;
  int64_t x_row_stride;
  int64_t panel_stride;
  float* out;
  int64_t out_row_stride;
  int64_t length;
  bool resume;  // continue the chains in `out`; else start them at 0
};

template <typename Load, int Rows, int Vecs>
static void run_fma_tile(const FmaTile& tile, const typename Load::Element* panel) {
  Vec sum[Rows][Vecs];
#pragma GCC unroll 16
  for (int row = 0; row < Rows; ++row) {
#pragma GCC unroll 16
    for (int v = 0; v < Vecs; ++v) {
      sum[row][v] = tile.resume ? Vec::load(tile.out + row * tile.out_row_stride + v * Vec::kWidth)
                                : Vec::zero();
    }
  }
  const float* x = tile.x;
  for (int64_t i = 0; i < tile.length; ++i) {
    Vec weight[Vecs];
#pragma GCC unroll 16
    for (int v = 0; v < Vecs; ++v) weight[v] = Load::load(panel + v * Vec::kWidth);
#pragma GCC unroll 16
    for (int row = 0; row < Rows; ++row) {
      const Vec value = Vec::set1(x[row * tile.x_row_stride + i]);
#pragma GCC unroll 16
      for (int v = 0; v < Vecs; ++v) sum[row][v] = fma(value, weight[v], sum[row][v]);
    }
    panel += tile.panel_stride;
  }
#pragma GCC unroll 16
  for (int row = 0; row < Rows; ++row) {
#pragma GCC unroll 16
    for (int v = 0; v < Vecs; ++v) {
      sum[row][v].store(tile.out + row * tile.out_row_stride + v * Vec::kWidth);
    }
  }
}

template <typename Load, int Rows, int Vecs>
static void run_fma_rows(const FmaTile& tile, const typename Load::Element* panel, int64_t rows) {
  if constexpr (Rows > 1) {
    if (rows < Rows) return run_fma_rows<Load, Rows - 1, Vecs>(tile, panel, rows);
  }
  run_fma_tile<Load, Rows, Vecs>(tile, panel);
}

// Any number of rows and of columns (a multiple of Vec::kWidth), cut into register tiles.
template <typename Load>
static void run_fma(FmaTile tile, const typename Load::Element* panel, int64_t rows,
                    int64_t columns) {
  const float* x = tile.x;
  float* out = tile.out;
  for (int64_t column = 0; column < columns;) {
    const bool is_wide = columns - column >= kFmaTileVecs * Vec::kWidth;
    for (int64_t row = 0; row < rows; row += kFmaTileRows) {
      const int64_t count = rows - row < kFmaTileRows ? rows - row : kFmaTileRows;
      tile.x = x + row * tile.x_row_stride;
      tile.out = out + row * tile.out_row_stride + column;
      if (is_wide) {
        run_fma_rows<Load, kFmaTileRows, kFmaTileVecs>(tile, panel + column, count);
      } else {
        run_fma_rows<Load, kFmaTileRows, 1>(tile, panel + column, count);
      }
    }
    column += is_wide ? kFmaTileVecs * Vec::kWidth : Vec::kWidth;
  }
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
