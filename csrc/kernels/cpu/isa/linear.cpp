// Thin quantised linear layer: y[n, c] = sum over k of x[n, k] * w[k, c] + bias[c] + residual[n,
// c].
//
// The contract (docs/correctness.md): every output element is one chain of fused multiply-adds
// over k = 0, 1, ..., K-1, starting at 0, with w[k, c] rounded to float32 first. Row count,
// threads, panels and tiles only choose which chains run side by side; none enters a sum.
// So one row alone and the same row among a thousand give the same bits.
//
// Two ways to run the same chains:
//  - thin (up to kMaxTileRows rows): weights are converted in registers and used at once;
//  - block (more rows): a strip of a panel is converted once into an L1 buffer and used by every
//    row tile; accumulators rest in the output between strips, which is exact.
#include <algorithm>
#include <cstring>

#include "csrc/kernels/cpu/isa/kernels.h"
#include "csrc/kernels/cpu/isa/simd.h"

namespace skv::cpu::SKV_ISA_NS {
namespace {

constexpr int kVecsPerPanel = static_cast<int>(kPanelColumns) / Vec::kWidth;
#if defined(__AVX512F__)
constexpr int kMaxTileRows = 12;  // 12 x 2 accumulators + 2 weights + 1 broadcast of 32 registers
constexpr int kBlockPanels = 2;
constexpr int thin_panels(int rows) { return rows <= 1 ? 8 : rows <= 5 ? 4 : 2; }
constexpr int64_t kStripLength = 288;  // most k values of a converted strip: it stays in the L1
constexpr int64_t kBlockRows = 264;    // rows whose strip of activations stays in the L2 cache
#elif defined(__AVX2__)
constexpr int kMaxTileRows = 6;  // 6 x 2 accumulators + 2 weights + 1 broadcast of 16 registers
constexpr int kBlockPanels = 1;
constexpr int thin_panels(int rows) { return rows <= 1 ? 4 : rows <= 2 ? 2 : 1; }
constexpr int64_t kStripLength = 256;  // smaller caches go with this instruction set
constexpr int64_t kBlockRows = 240;
#else
constexpr int kMaxTileRows = 2;  // 2 x 4 accumulators of 16 registers
constexpr int kBlockPanels = 1;
constexpr int thin_panels(int rows) { return rows <= 1 ? 2 : 1; }
constexpr int64_t kStripLength = 256;
constexpr int64_t kBlockRows = 120;
#endif
constexpr int64_t kMinFmasPerThread = 1 << 15;  // less work than this is not worth waking a thread
constexpr int64_t kPadding = Vec::kWidth;       // floats behind the packed rows

struct Formats {
  struct Float32 {
    static constexpr WeightFormat kFormat = WeightFormat::kFloat32;
    static constexpr int64_t bytes_for(int64_t k) { return k * kPanelColumns * 4; }
  };
  struct Int8 {
    static constexpr WeightFormat kFormat = WeightFormat::kInt8;
    static constexpr int64_t bytes_for(int64_t k) { return k * kPanelColumns; }
  };
  struct Int4 {
    static constexpr WeightFormat kFormat = WeightFormat::kInt4;
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

// One tile: Rows x (Panels * 16) chains over `length` values of k. x(row, k) is at
// input.data[row * row_stride + k * k_stride]; accumulators start from the output where Resume,
// else from 0, and end in the output.
struct TileInput {
  const float* data;
  int64_t row_stride;
  int64_t k_stride;
};

struct TileOutput {
  float* data;  // first row, first column of the tile
  int64_t row_stride;
  int64_t num_columns;  // valid columns from `data` on; the last panel may be cut
};

template <typename Format, int Rows, int Panels, bool Resume>
void run_full_tile(const PanelView& view, const TileInput& input, float* output,
                   int64_t output_stride, int64_t length) {
  constexpr int kVecs = Panels * kVecsPerPanel;
  constexpr int kSteps = Decoder<Format>::kSteps;
  constexpr bool kGrouped = Format::kFormat != WeightFormat::kFloat32;
  constexpr bool kHasMinimum = Format::kFormat == WeightFormat::kInt4;
  constexpr int64_t kStepBytes = Decoder<Format>::kVecBytes * kVecsPerPanel;

  Vec sum[Rows][kVecs];
#pragma GCC unroll 16
  for (int row = 0; row < Rows; ++row) {
#pragma GCC unroll 16
    for (int v = 0; v < kVecs; ++v) {
      sum[row][v] =
          Resume ? Vec::load(output + row * output_stride + v * Vec::kWidth) : Vec::zero();
    }
  }

  const uint8_t* weight = view.weight;
  const float* x = input.data;
  for (int64_t group = 0; group < length; group += kGroupSize) {
    Vec scale[kVecs];
    Vec minimum[kVecs];
    const int64_t group_offset = group / kGroupSize * kPanelColumns;
#pragma GCC unroll 16
    for (int v = 0; v < kVecs; ++v) {
      const int64_t at =
          v / kVecsPerPanel * view.group_stride + group_offset + v % kVecsPerPanel * Vec::kWidth;
      scale[v] = kGrouped ? Vec::load(view.scales + at) : Vec::zero();
      minimum[v] = kHasMinimum ? Vec::load(view.minimums + at) : Vec::zero();
    }
    const int64_t group_end = std::min<int64_t>(kGroupSize, length - group);
    for (int64_t k = 0; k < group_end; k += kSteps) {
      Vec w[kVecs][kSteps];
#pragma GCC unroll 16
      for (int v = 0; v < kVecs; ++v) {
        Decoder<Format>::decode(weight + v / kVecsPerPanel * view.weight_stride +
                                    v % kVecsPerPanel * Decoder<Format>::kVecBytes,
                                scale[v], minimum[v], w[v]);
      }
#pragma GCC unroll 2
      for (int step = 0; step < kSteps; ++step) {
#pragma GCC unroll 16
        for (int row = 0; row < Rows; ++row) {
          const Vec value = Vec::set1(x[row * input.row_stride + step * input.k_stride]);
#pragma GCC unroll 16
          for (int v = 0; v < kVecs; ++v) sum[row][v] = fma(value, w[v][step], sum[row][v]);
        }
      }
      weight += kStepBytes;
      x += kSteps * input.k_stride;
    }
  }

#pragma GCC unroll 16
  for (int row = 0; row < Rows; ++row) {
#pragma GCC unroll 16
    for (int v = 0; v < kVecs; ++v) {
      sum[row][v].store(output + row * output_stride + v * Vec::kWidth);
    }
  }
}

// The same for a tile whose last panel is cut: the full tile goes through a buffer.
template <typename Format, int Rows, int Panels, bool Resume>
void run_tile(const PanelView& view, const TileInput& input, const TileOutput& output,
              int64_t length) {
  constexpr int64_t kColumns = Panels * kPanelColumns;
  if (output.num_columns >= kColumns) {
    return run_full_tile<Format, Rows, Panels, Resume>(view, input, output.data, output.row_stride,
                                                       length);
  }
  float buffer[Rows * kColumns] = {};
  const auto row_bytes = static_cast<size_t>(output.num_columns) * sizeof(float);
  for (int row = 0; Resume && row < Rows; ++row) {
    std::memcpy(buffer + row * kColumns, output.data + row * output.row_stride, row_bytes);
  }
  run_full_tile<Format, Rows, Panels, Resume>(view, input, buffer, kColumns, length);
  for (int row = 0; row < Rows; ++row) {
    std::memcpy(output.data + row * output.row_stride, buffer + row * kColumns, row_bytes);
  }
}

// Calls visit.template operator()<Rows>() for the run-time number of rows.
template <int Rows = kMaxTileRows, typename Visit>
SKV_INLINE void dispatch_rows(int64_t rows, Visit&& visit) {
  if constexpr (Rows > 1) {
    if (rows < Rows) return dispatch_rows<Rows - 1>(rows, visit);
  }
  visit.template operator()<Rows>();
}

// What comes after the sum, in this order: bias, residual.
void finish_columns(const QuantizedLinearParams& p, int64_t row_begin, int64_t row_end,
                    int64_t begin, int64_t end) {
  for (int64_t row = row_begin; row < row_end; ++row) {
    float* out = p.output + row * p.out_features;
    if (p.bias != nullptr) {
      for (int64_t c = begin; c < end; ++c) out[c] += p.bias[c];
    }
    if (p.residual != nullptr) {
      const float* residual = p.residual + row * p.out_features;
      for (int64_t c = begin; c < end; ++c) out[c] += residual[c];
    }
  }
}

// Panels [begin, end) in groups of Panels, then of half as many, down to one.
template <typename Format, int Rows, int Panels>
void run_thin(const QuantizedLinearParams& p, int64_t begin, int64_t end) {
  for (; begin + Panels <= end; begin += Panels) {
    const int64_t column = begin * kPanelColumns;
    run_tile<Format, Rows, Panels, false>(
        panel_view<Format>(p, begin, 0), {p.input, p.input_row_stride, 1},
        {p.output + column, p.out_features, p.out_features - column}, p.in_features);
  }
  if constexpr (Panels > 1) {
    if (begin < end) run_thin<Format, Rows, Panels / 2>(p, begin, end);
  }
}

// Converts k in [k, k + length) of `panels` panels into float32 panels of kStripLength rows.
template <typename Format>
void decode_strip(const QuantizedLinearParams& p, int64_t panel, int64_t panels, int64_t k,
                  int64_t length, float* strip) {
  constexpr int kSteps = Decoder<Format>::kSteps;
  for (int64_t i = 0; i < panels; ++i) {
    const PanelView view = panel_view<Format>(p, panel + i, k);
    float* to = strip + i * kStripLength * kPanelColumns;
    const uint8_t* weight = view.weight;
    for (int64_t at = 0; at < length; at += kSteps) {
      for (int v = 0; v < kVecsPerPanel; ++v) {
        const int64_t group = at / kGroupSize * kPanelColumns + v * Vec::kWidth;
        const Vec scale = view.scales != nullptr ? Vec::load(view.scales + group) : Vec::zero();
        const Vec minimum =
            view.minimums != nullptr ? Vec::load(view.minimums + group) : Vec::zero();
        Vec w[kSteps];
        Decoder<Format>::decode(weight + v * Decoder<Format>::kVecBytes, scale, minimum, w);
        for (int step = 0; step < kSteps; ++step) {
          w[step].store(to + (at + step) * kPanelColumns + v * Vec::kWidth);
        }
      }
      weight += Decoder<Format>::kVecBytes * kVecsPerPanel;
    }
  }
}

// Rows of a block cut into tiles of nearly equal height, at most kMaxTileRows each.
struct Tiling {
  int64_t num_rows;
  int64_t num_tiles;

  explicit Tiling(int64_t rows)
      : num_rows(rows), num_tiles((rows + kMaxTileRows - 1) / kMaxTileRows) {}
  int64_t begin(int64_t tile) const { return tile * num_rows / num_tiles; }
};

// x[row, k] of the block as [tile][k][row in tile], so that a tile reads it in one stream. Whole
// vectors are stored: what they write behind a tile is written over by what follows, or is padding.
void pack_rows(const float* input, int64_t row_stride, const Tiling& tiling, int64_t length,
               float* packed) {
  static_assert(kMaxTileRows <= Vec::kWidth);
  for (int64_t tile = 0; tile < tiling.num_tiles; ++tile) {
    const int64_t first = tiling.begin(tile);
    const int64_t rows = tiling.begin(tile + 1) - first;
    const float* from = input + first * row_stride;
    float* to = packed + first * kStripLength;
    int64_t k = 0;
    for (; k + Vec::kWidth <= length; k += Vec::kWidth) {
      Vec block[Vec::kWidth];
#pragma GCC unroll 16
      for (int row = 0; row < Vec::kWidth; ++row) {
        block[row] = row < rows ? Vec::load(from + row * row_stride + k) : Vec::zero();
      }
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < Vec::kWidth; ++i) block[i].store(to + (k + i) * rows);
    }
    for (; k < length; ++k) {
      for (int64_t row = 0; row < rows; ++row) to[k * rows + row] = from[row * row_stride + k];
    }
  }
}

template <int Panels, bool Resume>
void run_block_tiles(const float* strip, const float* packed, const Tiling& tiling, int64_t length,
                     const TileOutput& output) {
  PanelView view{};
  view.weight = reinterpret_cast<const uint8_t*>(strip);
  view.weight_stride = kStripLength * kPanelColumns * 4;
  for (int64_t tile = 0; tile < tiling.num_tiles; ++tile) {
    const int64_t first = tiling.begin(tile);
    dispatch_rows(tiling.begin(tile + 1) - first, [&]<int Rows>() {
      run_tile<Formats::Float32, Rows, Panels, Resume>(
          view, {packed + first * kStripLength, 1, Rows},
          {output.data + first * output.row_stride, output.row_stride, output.num_columns}, length);
    });
  }
}

template <int Panels>
void run_block_panels(const QuantizedLinearParams& p, const float* strip, const float* packed,
                      const Tiling& tiling, int64_t first_row, int64_t panel, int64_t k,
                      int64_t length) {
  const int64_t column = panel * kPanelColumns;
  const TileOutput output{p.output + first_row * p.out_features + column, p.out_features,
                          p.out_features - column};
  if (k == 0) {
    run_block_tiles<Panels, false>(strip, packed, tiling, length, output);
  } else {
    run_block_tiles<Panels, true>(strip, packed, tiling, length, output);
  }
}

// Rows [row_begin, row_end), at most kBlockRows, by panels [begin, end).
template <typename Format>
void run_block(const QuantizedLinearParams& p, int64_t row_begin, int64_t row_end, int64_t begin,
               int64_t end) {
  alignas(64) float strip[kBlockPanels * kStripLength * kPanelColumns];
  alignas(64) float packed[kBlockRows * kStripLength + kPadding];
  const Tiling tiling(row_end - row_begin);
  // Strips of about equal length, whole groups each: a short last one would cost as much moving of
  // accumulators as a long one.
  const int64_t num_strips = (p.in_features + kStripLength - 1) / kStripLength;
  const int64_t per_strip = (p.in_features + num_strips - 1) / num_strips;
  const int64_t strip_length = (per_strip + kGroupSize - 1) / kGroupSize * kGroupSize;
  for (int64_t k = 0; k < p.in_features; k += strip_length) {
    const int64_t length = std::min(strip_length, p.in_features - k);
    pack_rows(p.input + row_begin * p.input_row_stride + k, p.input_row_stride, tiling, length,
              packed);
    for (int64_t panel = begin; panel < end; panel += kBlockPanels) {
      const int64_t panels = std::min<int64_t>(kBlockPanels, end - panel);
      decode_strip<Format>(p, panel, panels, k, length, strip);
      if (panels == kBlockPanels) {
        run_block_panels<kBlockPanels>(p, strip, packed, tiling, row_begin, panel, k, length);
      } else {
        run_block_panels<1>(p, strip, packed, tiling, row_begin, panel, k, length);
      }
    }
  }
}

// Sums over nothing: what the tiles would write if they had a k to walk.
void clear_columns(const QuantizedLinearParams& p, int64_t row_begin, int64_t row_end,
                   int64_t begin, int64_t end) {
  for (int64_t row = row_begin; row < row_end; ++row) {
    std::memset(p.output + row * p.out_features + begin, 0,
                static_cast<size_t>(end - begin) * sizeof(float));
  }
}

template <typename Format>
void run_panels(const QuantizedLinearParams& p, int64_t row_begin, int64_t row_end, int64_t begin,
                int64_t end) {
  const int64_t column_begin = begin * kPanelColumns;
  const int64_t column_end = std::min(end * kPanelColumns, p.out_features);
  if (p.in_features == 0) {
    clear_columns(p, row_begin, row_end, column_begin, column_end);
  } else if (p.num_rows <= kMaxTileRows) {
    dispatch_rows(p.num_rows,
                  [&]<int Rows>() { run_thin<Format, Rows, thin_panels(Rows)>(p, begin, end); });
  } else {
    run_block<Format>(p, row_begin, row_end, begin, end);
  }
  finish_columns(p, row_begin, row_end, column_begin, column_end);
}

}  // namespace

void quantized_linear(const QuantizedLinearParams& p, ParallelFor parallel_for) {
  if (p.num_rows == 0 || p.out_features == 0) return;
  // The work is a list of pairs of panels (what the wide tiles work on), once for each block of
  // rows. With many rows a thread so gets blocks of its own and packs no row that another packs.
  const int64_t num_panels = (p.out_features + kPanelColumns - 1) / kPanelColumns;
  const int64_t num_pairs = (num_panels + 1) / 2;
  const int64_t num_blocks = (p.num_rows + kBlockRows - 1) / kBlockRows;
  const int64_t fmas_per_pair =
      std::max<int64_t>(1, p.num_rows / num_blocks * p.in_features * 2 * kPanelColumns);
  const int64_t grain = std::max<int64_t>(1, kMinFmasPerThread / fmas_per_pair);
  parallel_for(num_blocks * num_pairs, grain, [&](int64_t first, int64_t last) {
    while (first < last) {
      const int64_t block = first / num_pairs;
      const int64_t next = std::min(last, (block + 1) * num_pairs);
      const int64_t row_begin = block * p.num_rows / num_blocks;
      const int64_t row_end = (block + 1) * p.num_rows / num_blocks;
      const int64_t begin = (first - block * num_pairs) * 2;
      const int64_t end = std::min((next - block * num_pairs) * 2, num_panels);
      switch (p.format) {
        case WeightFormat::kFloat32:
          run_panels<Formats::Float32>(p, row_begin, row_end, begin, end);
          break;
        case WeightFormat::kInt8:
          run_panels<Formats::Int8>(p, row_begin, row_end, begin, end);
          break;
        case WeightFormat::kInt4:
          run_panels<Formats::Int4>(p, row_begin, row_end, begin, end);
          break;
      }
      first = next;
    }
  });
}

}  // namespace skv::cpu::SKV_ISA_NS
