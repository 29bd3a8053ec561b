// What linear layers share around the tiles: few rows by many panels, the norm before the product.
#pragma once

#include <algorithm>

#include "csrc/kernels/cpu/isa/linear_tile.h"
#include "csrc/kernels/cpu/isa/row_math.h"

namespace skv::cpu::SKV_ISA_NS {

// kThinRows: most rows whose weights are converted anew for every panel. thin_vecs(rows): vectors
// of columns that a thin tile of so many rows has.
#if defined(__AVX512F__)
inline constexpr int kThinRows = 12;
constexpr int thin_vecs(int rows) { return rows <= 1 ? 8 : rows <= 5 ? 4 : 2; }
#elif defined(__AVX2__)
inline constexpr int kThinRows = 12;  // over 6 rows: 12 x 1 accumulators, half a panel
constexpr int thin_vecs(int rows) { return rows <= 1 ? 8 : rows <= 2 ? 4 : rows <= 6 ? 2 : 1; }
#else
inline constexpr int kThinRows = 2;
constexpr int thin_vecs(int rows) { return rows <= 1 ? 8 : 4; }
#endif
// Less work than this is not worth waking a thread.
inline constexpr int64_t kMinFmasPerThread = 1 << 15;

// Calls visit.template operator()<Rows>() for the run-time number of rows, at most MaxRows.
template <int MaxRows, typename Visit>
SKV_INLINE void dispatch_rows(int64_t rows, Visit&& visit) {
  if constexpr (MaxRows > 1) {
    if (rows < MaxRows) return dispatch_rows<MaxRows - 1>(rows, visit);
  }
  visit.template operator()<MaxRows>();
}

// Calls visit.template operator()<Format>() for the run-time format.
template <typename Visit>
SKV_INLINE void dispatch_format(WeightFormat format, Visit&& visit) {
  switch (format) {
    case WeightFormat::kFloat32:
      return visit.template operator()<Formats::Float32>();
    case WeightFormat::kInt8:
      return visit.template operator()<Formats::Int8>();
    case WeightFormat::kInt4:
      return visit.template operator()<Formats::Int4>();
  }
}

// The input after prepare_input.
SKV_INLINE const float* floats_of(const void* input) { return static_cast<const float*>(input); }

// Panels [begin, end) for the first Rows rows of the input, in tiles of Vecs vectors, then of half
// as many, down to one panel; or each panel in parts of Vecs vectors. The output starts at the
// first panel.
template <typename Format, int Rows, int Vecs>
void run_thin(const QuantizedLinearParams& p, int64_t begin, int64_t end, TileOutput output) {
  constexpr int64_t kPanels = std::max(1, Vecs / kVecsPerPanel);
  for (; begin + kPanels <= end; begin += kPanels) {
    PanelView view = panel_view<Format>(p, begin, 0);
    for (int part = 0; part < std::max(1, kVecsPerPanel / Vecs); ++part) {
      if (output.num_columns <= 0) break;
      run_thin_tile<Format, Rows, Vecs>(view, {floats_of(p.input), p.input_row_stride}, output,
                                        p.in_features);
      view.skip_columns<Format>(Vecs * Vec::kWidth);
      output.data += Vecs * Vec::kWidth;
      output.num_columns -= Vecs * Vec::kWidth;
    }
  }
  if constexpr (kPanels > 1) {
    if (begin < end) run_thin<Format, Rows, Vecs / 2>(p, begin, end, output);
  }
}

// x <- x * weight / rms(x), where asked for; x is float32 afterwards. A few rows are not worth a
// wake-up of other threads.
inline void prepare_input(QuantizedLinearParams& p, ParallelFor parallel_for) {
  if (p.norm_weight == nullptr && p.activation_dtype == DType::kFloat32) return;
  const Row input{p.input, p.activation_dtype};
  const Row weight{p.norm_weight, p.norm_weight_dtype};
  const int64_t grain = p.num_rows <= kThinRows ? p.num_rows : kThinRows;
  parallel_for(p.num_rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const Row x = input.from(row * p.input_row_stride);
      float* y = p.float_input + row * p.in_features;
      if (p.norm_weight == nullptr) {
        x.copy_to(y, p.in_features);
      } else {
        normalise_row(x, weight, p.norm_epsilon, {y, DType::kFloat32}, p.in_features);
      }
    }
  });
  p.input = p.float_input;
  p.input_row_stride = p.in_features;
}

}  // namespace skv::cpu::SKV_ISA_NS
