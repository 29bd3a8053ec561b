// The register tile of attention: Rows x Vecs chains of fused multiply-adds over `length` steps,
//   out[row, c] (+)= sum over i of x[row * x_row_stride + i] * panel[i * panel_stride + c],
// each chain in ascending i. How the rows are cut into tiles never changes a chain.
#pragma once

#include "csrc/kernels/cpu/isa/elements.h"
#include "csrc/kernels/cpu/isa/read_ahead.h"
#include "csrc/kernels/cpu/isa/simd.h"

namespace skv::cpu::SKV_ISA_NS {

// Shape of a register tile: few rows take more columns, so that enough chains run side by side to
// hide the latency of an addition.
#if defined(__AVX512F__)
inline constexpr int kFmaTileRows = 6;
constexpr int fma_tile_vecs(int /*rows*/) { return 4; }
#elif defined(__AVX2__)
inline constexpr int kFmaTileRows = 6;
constexpr int fma_tile_vecs(int rows) { return rows <= 3 ? 4 : 2; }
#else
inline constexpr int kFmaTileRows = 4;
constexpr int fma_tile_vecs(int /*rows*/) { return 2; }
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

// Not inlined, so that the accumulators have all registers to themselves.
template <typename Load, int Rows, int Vecs, typename Ahead>
__attribute__((noinline)) static void run_fma_tile(const FmaTile& tile,
                                                   const typename Load::Element* panel,
                                                   Ahead ahead) {
  using Element = typename Load::Element;
  auto loop = ahead.begin();
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
    loop.template touch<Vecs * Vec::kWidth * sizeof(Element)>();
    // The shorter side is held in registers, the other passes through one.
    if constexpr (Rows < Vecs) {
      Vec value[Rows];
#pragma GCC unroll 16
      for (int row = 0; row < Rows; ++row) value[row] = Vec::set1(x[row * tile.x_row_stride + i]);
#pragma GCC unroll 16
      for (int v = 0; v < Vecs; ++v) {
        const Vec weight = Load::load(panel + v * Vec::kWidth);
#pragma GCC unroll 16
        for (int row = 0; row < Rows; ++row) sum[row][v] = fma(value[row], weight, sum[row][v]);
      }
    } else {
      Vec weight[Vecs];
#pragma GCC unroll 16
      for (int v = 0; v < Vecs; ++v) weight[v] = Load::load(panel + v * Vec::kWidth);
#pragma GCC unroll 16
      for (int row = 0; row < Rows; ++row) {
        const Vec value = Vec::set1(x[row * tile.x_row_stride + i]);
#pragma GCC unroll 16
        for (int v = 0; v < Vecs; ++v) sum[row][v] = fma(value, weight[v], sum[row][v]);
      }
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

// All columns of exactly Rows rows; the columns left over go to narrower tiles.
template <typename Load, int Rows, int Vecs, typename Ahead>
static void run_fma_columns(FmaTile tile, const typename Load::Element* panel, int64_t columns,
                            Ahead ahead) {
  constexpr int64_t kColumns = Vecs * Vec::kWidth;
  for (; columns >= kColumns; columns -= kColumns) {
    run_fma_tile<Load, Rows, Vecs>(tile, panel, ahead);
    tile.out += kColumns;
    panel += kColumns;
  }
  if constexpr (Vecs > 1) {
    if (columns > 0) run_fma_columns<Load, Rows, Vecs / 2>(tile, panel, columns, ahead);
  }
}

template <typename Load, int Rows, typename Ahead>
static void run_fma_rows(const FmaTile& tile, const typename Load::Element* panel, int64_t rows,
                         int64_t columns, Ahead ahead) {
  if constexpr (Rows > 1) {
    if (rows < Rows) return run_fma_rows<Load, Rows - 1>(tile, panel, rows, columns, ahead);
  }
  run_fma_columns<Load, Rows, fma_tile_vecs(Rows)>(tile, panel, columns, ahead);
}

// Any number of rows and of columns (a multiple of Vec::kWidth), cut into register tiles. The first
// of them reads ahead; for the others the panel is in the cache.
template <typename Load, typename Ahead>
static void run_fma(FmaTile tile, const typename Load::Element* panel, int64_t rows,
                    int64_t columns, Ahead ahead) {
  if (rows <= kFmaTileRows) {
    return run_fma_rows<Load, kFmaTileRows>(tile, panel, rows, columns, ahead);
  }
  run_fma_columns<Load, kFmaTileRows, fma_tile_vecs(kFmaTileRows)>(tile, panel, columns, ahead);
  tile.x += kFmaTileRows * tile.x_row_stride;
  tile.out += kFmaTileRows * tile.out_row_stride;
  run_fma<Load>(tile, panel, rows - kFmaTileRows, columns, NoReadAhead{});
}

}  // namespace skv::cpu::SKV_ISA_NS
