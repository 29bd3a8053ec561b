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

}  // namespace skv::cpu::SKV_ISA_NS
