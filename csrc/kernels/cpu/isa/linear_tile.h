// The register tile of a linear layer: Rows x Vecs chains over k of packed weights, converted to
// float32 in registers (see linear.cpp for the contract).
#pragma once

#include <algorithm>
#include <cstring>

#include "csrc/kernels/cpu/isa/simd.h"
#include "csrc/kernels/params.h"

namespace skv::cpu::SKV_ISA_NS {

inline constexpr int kVecsPerPanel = static_cast<int>(kPanelColumns) / Vec::kWidth;

// kColumnBytes: from one column of a panel to the next; a byte of Int4 holds two k of one column.
struct Formats {
  struct Float32 {
    static constexpr WeightFormat kFormat = WeightFormat::kFloat32;
    static constexpr int64_t kColumnBytes = 4;
    static constexpr int64_t bytes_for(int64_t k) { return k * kPanelColumns * 4; }
  };
  struct Int8 {
    static constexpr WeightFormat kFormat = WeightFormat::kInt8;
    static constexpr int64_t kColumnBytes = 1;
    static constexpr int64_t bytes_for(int64_t k) { return k * kPanelColumns; }
  };
  struct Int4 {
    static constexpr WeightFormat kFormat = WeightFormat::kInt4;
    static constexpr int64_t kColumnBytes = 1;
    static constexpr int64_t bytes_for(int64_t k) { return k / 2 * kPanelColumns; }
  };
};

// Where a run of panels starts, and how far apart they are.
struct PanelView {
  const uint8_t* weight;
  const float* scales;
  const float* minimums;
  int64_t weight_stride;  // bytes from panel to panel
  int64_t group_stride;   // floats from panel to panel in scales and minimums

  // The view of the same panels without their first columns.
  template <typename Format>
  void skip_columns(int64_t count) {
    weight += Format::kColumnBytes * count;
    if (scales != nullptr) scales += count;
    if (minimums != nullptr) minimums += count;
  }
};

template <typename Format>
PanelView panel_view(const QuantizedLinearParams& p, int64_t panel, int64_t k) {
  const int64_t groups = p.in_features / kGroupSize;
  const int64_t weight_stride = Format::bytes_for(p.in_features);
  PanelView view{};
  view.weight =
      static_cast<const uint8_t*>(p.weight) + panel * weight_stride + Format::bytes_for(k);
  view.weight_stride = weight_stride;
  view.group_stride = groups * kPanelColumns;
  const int64_t group_offset = panel * view.group_stride + k / kGroupSize * kPanelColumns;
  if (Format::kFormat != WeightFormat::kFloat32) view.scales = p.scales + group_offset;
  if (Format::kFormat == WeightFormat::kInt4) view.minimums = p.minimums + group_offset;
  return view;
}

// The float32 weights of one k (or of k and k + 1 for 4-bit) for one vector of columns.
template <typename Format>
struct Decoder;

template <>
struct Decoder<Formats::Float32> {
  static constexpr int kSteps = 1;
  static SKV_INLINE void decode(const uint8_t* weight, Vec /*scale*/, Vec /*minimum*/, Vec out[1]) {
    out[0] = Vec::load(reinterpret_cast<const float*>(weight));
  }
  static constexpr int64_t kVecBytes = Vec::kWidth * 4;
};

template <>
struct Decoder<Formats::Int8> {
  static constexpr int kSteps = 1;
  static SKV_INLINE void decode(const uint8_t* weight, Vec scale, Vec /*minimum*/, Vec out[1]) {
    out[0] = Vec::load_int8(reinterpret_cast<const int8_t*>(weight)) * scale;
  }
  static constexpr int64_t kVecBytes = Vec::kWidth;
};

template <>
struct Decoder<Formats::Int4> {
  static constexpr int kSteps = 2;
  static SKV_INLINE void decode(const uint8_t* weight, Vec scale, Vec minimum, Vec out[2]) {
    Vec low;
    Vec high;
    Vec::load_nibbles(weight, low, high);
    out[0] = fma(low, scale, minimum);
    out[1] = fma(high, scale, minimum);
  }
  static constexpr int64_t kVecBytes = Vec::kWidth;
};

// How many groups ahead of its use a weight is asked for. The streams of the panels of a tile are
// short and many, more than a hardware prefetcher follows.
inline constexpr int64_t kPrefetchGroups = 3;

// Asks for one group of each panel of a tile. Behind the last group of a tile (`is_next`) come the
// first ones of the next tile, a whole tile further on.
template <typename Format, int Panels>
SKV_INLINE void prefetch_group(const PanelView& view, const uint8_t* weight, int64_t group_offset,
                               bool is_next) {
  weight += is_next ? (Panels - 1) * view.weight_stride : 0;
  group_offset += is_next ? (Panels - 1) * view.group_stride : 0;
#pragma GCC unroll 16
  for (int64_t panel = 0; panel < Panels; ++panel) {
    for (int64_t line = 0; line < Format::bytes_for(kGroupSize); line += 64) {
      __builtin_prefetch(weight + panel * view.weight_stride + line);
    }
    const int64_t at = group_offset + panel * view.group_stride;
    __builtin_prefetch(view.scales + at);
    if (Format::kFormat == WeightFormat::kInt4) __builtin_prefetch(view.minimums + at);
  }
}

struct TileInput {
  const float* data;  // x(row, k) at data[row * row_stride + k]
  int64_t row_stride;
};

struct TileOutput {
  float* data;  // first row, first column of the tile
  int64_t row_stride;
  int64_t num_columns;  // valid columns from `data` on; the last panel may be cut
};

// A thin tile: Rows x Vecs vectors of chains (whole panels, or a part of one) over `length` values
// of k, weights converted on the way.
template <typename Format, int Rows, int Vecs>
void run_full_thin_tile(const PanelView& view, const TileInput& input, float* output,
                        int64_t output_stride, int64_t length) {
  constexpr int kPanels = (Vecs + kVecsPerPanel - 1) / kVecsPerPanel;
  constexpr int kSteps = Decoder<Format>::kSteps;
  constexpr bool kGrouped = Format::kFormat != WeightFormat::kFloat32;
  constexpr bool kHasMinimum = Format::kFormat == WeightFormat::kInt4;
  constexpr int64_t kStepBytes = Decoder<Format>::kVecBytes * kVecsPerPanel;

  Vec sum[Rows][Vecs];
#pragma GCC unroll 16
  for (int row = 0; row < Rows; ++row) {
#pragma GCC unroll 16
    for (int v = 0; v < Vecs; ++v) sum[row][v] = Vec::zero();
  }

  const uint8_t* weight = view.weight;
  const float* x = input.data;
  for (int64_t group = 0; group < length; group += kGroupSize) {
    Vec scale[Vecs];
    Vec minimum[Vecs];
    const int64_t group_offset = group / kGroupSize * kPanelColumns;
#pragma GCC unroll 16
    for (int v = 0; v < Vecs; ++v) {
      const int64_t at =
          v / kVecsPerPanel * view.group_stride + group_offset + v % kVecsPerPanel * Vec::kWidth;
      scale[v] = kGrouped ? Vec::load(view.scales + at) : Vec::zero();
      minimum[v] = kHasMinimum ? Vec::load(view.minimums + at) : Vec::zero();
    }
    if constexpr (kGrouped) {
      constexpr int64_t kAhead = kPrefetchGroups * kGroupSize;
      prefetch_group<Format, kPanels>(view, weight + Format::bytes_for(kAhead),
                                      group_offset + kPrefetchGroups * kPanelColumns,
                                      group + kAhead >= length);
    }
    const int64_t group_end = std::min<int64_t>(kGroupSize, length - group);
    for (int64_t k = 0; k < group_end; k += kSteps) {
      Vec w[Vecs][kSteps];
#pragma GCC unroll 16
      for (int v = 0; v < Vecs; ++v) {
        Decoder<Format>::decode(weight + v / kVecsPerPanel * view.weight_stride +
                                    v % kVecsPerPanel * Decoder<Format>::kVecBytes,
                                scale[v], minimum[v], w[v]);
      }
#pragma GCC unroll 2
      for (int step = 0; step < kSteps; ++step) {
#pragma GCC unroll 16
        for (int row = 0; row < Rows; ++row) {
          const Vec value = Vec::set1(x[row * input.row_stride + step]);
#pragma GCC unroll 16
          for (int v = 0; v < Vecs; ++v) sum[row][v] = fma(value, w[v][step], sum[row][v]);
        }
      }
      weight += kStepBytes;
      x += kSteps;
    }
  }

#pragma GCC unroll 16
  for (int row = 0; row < Rows; ++row) {
#pragma GCC unroll 16
    for (int v = 0; v < Vecs; ++v) {
      sum[row][v].store(output + row * output_stride + v * Vec::kWidth);
    }
  }
}

// A tile on converted weights: Rows x Vecs vectors of chains over `length` values of k. Vector v of
// k is at strip[v / kVecsPerPanel * strip_stride + k * 16 + v % kVecsPerPanel * width], x(row, k)
// at packed[k * Rows + row]. The chains start from the output where Resume, else from 0.
template <int Rows, int Vecs, bool Resume>
void run_full_packed_tile(const float* strip, int64_t strip_stride, const float* packed,
                          float* output, int64_t output_stride, int64_t length) {
  Vec sum[Rows][Vecs];
#pragma GCC unroll 16
  for (int row = 0; row < Rows; ++row) {
#pragma GCC unroll 16
    for (int v = 0; v < Vecs; ++v) {
      sum[row][v] =
          Resume ? Vec::load(output + row * output_stride + v * Vec::kWidth) : Vec::zero();
    }
  }
#pragma GCC unroll 4
  for (int64_t k = 0; k < length; ++k) {
    Vec w[Vecs];
#pragma GCC unroll 16
    for (int v = 0; v < Vecs; ++v) {
      w[v] = Vec::load(strip + v / kVecsPerPanel * strip_stride + v % kVecsPerPanel * Vec::kWidth);
    }
#pragma GCC unroll 16
    for (int row = 0; row < Rows; ++row) {
      const Vec value = Vec::set1(packed[row]);
#pragma GCC unroll 16
      for (int v = 0; v < Vecs; ++v) sum[row][v] = fma(value, w[v], sum[row][v]);
    }
    strip += kPanelColumns;
    packed += Rows;
  }
#pragma GCC unroll 16
  for (int row = 0; row < Rows; ++row) {
#pragma GCC unroll 16
    for (int v = 0; v < Vecs; ++v) {
      sum[row][v].store(output + row * output_stride + v * Vec::kWidth);
    }
  }
}

// Calls run(output, stride) for a tile of `Columns` columns; where the last panel is cut, on a
// buffer that goes to the output afterwards and, where Resume, comes from it before.
template <int Rows, int64_t Columns, bool Resume, typename Run>
SKV_INLINE void run_cut_tile(const TileOutput& output, Run&& run) {
  if (output.num_columns >= Columns) return run(output.data, output.row_stride);
  float buffer[Rows * Columns] = {};
  const auto row_bytes = static_cast<size_t>(output.num_columns) * sizeof(float);
  for (int row = 0; Resume && row < Rows; ++row) {
    std::memcpy(buffer + row * Columns, output.data + row * output.row_stride, row_bytes);
  }
  run(buffer, Columns);
  for (int row = 0; row < Rows; ++row) {
    std::memcpy(output.data + row * output.row_stride, buffer + row * Columns, row_bytes);
  }
}

template <typename Format, int Rows, int Vecs>
void run_thin_tile(const PanelView& view, const TileInput& input, const TileOutput& output,
                   int64_t length) {
  run_cut_tile<Rows, Vecs * Vec::kWidth, false>(output, [&](float* out, int64_t stride) {
    run_full_thin_tile<Format, Rows, Vecs>(view, input, out, stride, length);
  });
}

template <int Rows, int Vecs, bool Resume>
void run_packed_tile(const float* strip, int64_t strip_stride, const float* packed,
                     const TileOutput& output, int64_t length) {
  run_cut_tile<Rows, Vecs * Vec::kWidth, Resume>(output, [&](float* out, int64_t stride) {
    run_full_packed_tile<Rows, Vecs, Resume>(strip, strip_stride, packed, out, stride, length);
  });
}

}  // namespace skv::cpu::SKV_ISA_NS
