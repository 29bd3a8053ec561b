// Thin quantised linear layer: y[n, c] = sum over k of x[n, k] * w[k, c] + bias[c] + residual[n,
// c], where x may be normalised first, and y may be silu(gate) * up of pairs of panels. All of it
// is float32: a 16-bit x is widened first, and what is returned for it is rounded last.
//
// The contract (docs/correctness.md): every output element is one chain of fused multiply-adds
// over k = 0, 1, ..., K-1, starting at 0, with w[k, c] rounded to float32 first. Row count,
// threads, panels and tiles only choose which chains run side by side; none enters a sum.
// So one row alone and the same row among a thousand give the same bits.
//
// Two ways to run the same chains:
//  - thin (up to kThinRows rows): weights are converted in registers and used at once;
//  - block (more rows): a strip of a panel is converted once into a buffer and used by every row
//    tile; accumulators rest in the output between strips, which is exact.
#include <algorithm>
#include <cstring>

#include "csrc/kernels/cpu/isa/kernels.h"
#include "csrc/kernels/cpu/isa/linear_thin.h"
#include "csrc/kernels/cpu/isa/row_math.h"

namespace skv::cpu::SKV_ISA_NS {
namespace {

// kTileRows: rows of a tile as wide as a panel.
#if defined(__AVX512F__)
constexpr int kTileRows = 12;  // 12 x 2 accumulators + 2 weights + 1 broadcast of 32 registers
constexpr int kBlockPanels = 2;
constexpr int64_t kStripLength = 576;  // most k values of a converted strip
constexpr int64_t kBlockRows = 132;    // with the rows of a strip, it stays in the L2 cache
#elif defined(__AVX2__)
constexpr int kTileRows = 6;  // 6 x 2 accumulators + 2 weights + 1 broadcast of 16 registers
constexpr int kBlockPanels = 1;
constexpr int64_t kStripLength = 256;  // smaller caches go with this instruction set
constexpr int64_t kBlockRows = 240;
#else
constexpr int kTileRows = 2;  // 2 x 4 accumulators of 16 registers
constexpr int kBlockPanels = 1;
constexpr int64_t kStripLength = 256;
constexpr int64_t kBlockRows = 120;
#endif
constexpr int64_t kPadding = Vec::kWidth;  // floats behind the packed rows

// What comes after the sums, in this order: bias, then residual or silu(gate) * up, then rounding.
void finish_columns(const QuantizedLinearParams& p, int64_t row_begin, int64_t row_end,
                    int64_t begin, int64_t end) {
  const Row bias{p.bias, p.bias_dtype};
  const Row residual{p.residual, p.activation_dtype};
  const OutputRow activated{p.activated, p.activation_dtype};
  for (int64_t row = row_begin; row < row_end; ++row) {
    const int64_t at = row * p.out_features + begin;
    float* sums = p.sums + at;
    if (p.bias != nullptr) add_row(sums, bias.from(begin), end - begin);
    if (p.residual != nullptr) add_row(sums, residual.from(at), end - begin);
    if (p.rounded != nullptr) store_run(sums, end - begin, p.rounded, p.activation_dtype, at);
    if (p.activated == nullptr) continue;
    float wide[kPanelColumns];
    for (int64_t c = 0; c < end - begin; c += 2 * kPanelColumns) {
      float* results = activated.place((at + c) / 2, wide);
      silu_mul_row(sums + c, sums + c + kPanelColumns, results, kPanelColumns);
      activated.finish(results, (at + c) / 2, kPanelColumns);
    }
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
      __builtin_prefetch(weight + Format::bytes_for(kPrefetchGroups * kGroupSize));
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

// Rows of a block cut into tiles of nearly equal height, at most kTileRows each.
struct Tiling {
  int64_t num_rows;
  int64_t num_tiles;

  explicit Tiling(int64_t rows) : num_rows(rows), num_tiles((rows + kTileRows - 1) / kTileRows) {}
  int64_t begin(int64_t tile) const { return tile * num_rows / num_tiles; }
};

// x[row, k] of the block as [tile][k][row in tile], so that a tile reads it in one stream. Whole
// vectors are stored: what they write behind a tile is written over by what follows, or is padding.
void pack_rows(const float* input, int64_t row_stride, const Tiling& tiling, int64_t length,
               float* packed) {
  static_assert(kTileRows <= Vec::kWidth);
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

template <int Vecs, bool Resume>
void run_block_tiles(const float* strip, const float* packed, const Tiling& tiling, int64_t length,
                     const TileOutput& output) {
  for (int64_t tile = 0; tile < tiling.num_tiles; ++tile) {
    const int64_t first = tiling.begin(tile);
    dispatch_rows<kTileRows>(tiling.begin(tile + 1) - first, [&]<int Rows>() {
      run_packed_tile<Rows, Vecs, Resume>(
          strip, kStripLength * kPanelColumns, packed + first * kStripLength,
          {output.data + first * output.row_stride, output.row_stride, output.num_columns}, length);
    });
  }
}

template <int Panels>
void run_block_panels(const QuantizedLinearParams& p, const float* strip, const float* packed,
                      const Tiling& tiling, int64_t first_row, int64_t panel, int64_t k,
                      int64_t length) {
  const int64_t column = panel * kPanelColumns;
  constexpr int kVecs = Panels * kVecsPerPanel;
  const TileOutput output{p.sums + first_row * p.out_features + column, p.out_features,
                          p.out_features - column};
  if (k == 0) {
    run_block_tiles<kVecs, false>(strip, packed, tiling, length, output);
  } else {
    run_block_tiles<kVecs, true>(strip, packed, tiling, length, output);
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
    pack_rows(floats_of(p.input) + row_begin * p.input_row_stride + k, p.input_row_stride, tiling,
              length, packed);
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
    std::memset(p.sums + row * p.out_features + begin, 0,
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
  } else if (p.num_rows <= kThinRows) {
    const TileOutput output{p.sums + column_begin, p.out_features, column_end - column_begin};
    dispatch_rows<kThinRows>(p.num_rows, [&]<int Rows>() {
      run_thin<Format, Rows, thin_vecs(Rows)>(p, begin, end, output);
    });
  } else {
    run_block<Format>(p, row_begin, row_end, begin, end);
  }
  finish_columns(p, row_begin, row_end, column_begin, column_end);
}

}  // namespace

void quantized_linear(const QuantizedLinearParams& params, ParallelFor parallel_for) {
  QuantizedLinearParams p = params;
  if (p.num_rows == 0 || p.out_features == 0) return;
  prepare_input(p, parallel_for);
  // The work is a list of pairs of panels (what the wide tiles work on, and a gate with what it
  // opens), once for each block of rows. With many rows a thread so gets blocks of its own and
  // packs no row that another packs.
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
      dispatch_format(p.format, [&]<typename Format>() {
        run_panels<Format>(p, row_begin, row_end, begin, end);
      });
      first = next;
    }
  });
}

}  // namespace skv::cpu::SKV_ISA_NS
