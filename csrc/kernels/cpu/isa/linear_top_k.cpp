// The k largest outputs of each row of a linear layer; no row of outputs is ever in memory.
//
// The sums are those of quantized_linear, chain by chain (see linear.cpp). What is kept of them
// follows a total order of (value, column): a NaN is above every number, larger is above smaller,
// of equals the lower column is above. So it does not matter which columns were looked at together,
// and threads may share the columns in any way: the k best of the whole are among the k best of
// each share.
#include <algorithm>
#include <cmath>

#include "csrc/kernels/cpu/isa/kernels.h"
#include "csrc/kernels/cpu/isa/linear_thin.h"

namespace skv::cpu::SKV_ISA_NS {
namespace {

constexpr int64_t kChunkPanels = 8;  // what the widest tile has; a chunk's weights stay in the L2
constexpr int64_t kChunkColumns = kChunkPanels * kPanelColumns;
constexpr int64_t kScanColumns = 64;  // looked at together, since few columns enter a list
static_assert(kChunkColumns % kScanColumns == 0 && kScanColumns % Vec::kWidth == 0);

// Of columns taken in ascending order, whether a later one goes before an earlier one.
bool goes_before(float later, float earlier) {
  return later > earlier || (std::isnan(later) && !std::isnan(earlier));
}

// The best columns so far, best first. Columns of equal value must come in ascending order.
struct BestColumns {
  float* values;
  int64_t* ids;
  int64_t* count;
  int64_t capacity;

  bool is_full() const { return *count == capacity; }

  void add(float value, int64_t id) {
    if (is_full() && !goes_before(value, values[capacity - 1])) return;
    int64_t at = is_full() ? capacity - 1 : (*count)++;
    for (; at > 0 && goes_before(value, values[at - 1]); --at) {
      values[at] = values[at - 1];
      ids[at] = ids[at - 1];
    }
    values[at] = value;
    ids[at] = id;
  }

  // Whether add() may take one of kScanColumns values.
  bool may_take(const float* candidates) const {
    if (!is_full()) return true;
    const Vec last = Vec::set1(values[capacity - 1]);
    Vec found = Vec::zero();
    for (int64_t i = 0; i < kScanColumns; i += Vec::kWidth) {
      // 1 for values above the last one, also for those equal to it, and for NaN.
      found =
          max(found, select_less(Vec::load(candidates + i), last, Vec::zero(), Vec::set1(1.0F)));
    }
    return reduce_max(found) > 0;
  }

  void add_all(const float* candidates, int64_t num, int64_t first_id) {
    for (int64_t i = 0; i < num; i += kScanColumns) {
      const int64_t end = std::min(num, i + kScanColumns);
      if (end - i == kScanColumns && !may_take(candidates + i)) continue;
      for (int64_t c = i; c < end; ++c) add(candidates[c], first_id + c);
    }
  }
};

// The list of one row of a block in a part of the columns.
BestColumns list_of(const LinearTopKParams& p, int64_t part, int64_t row) {
  const int64_t list = part * std::min(kTopKBlockRows, p.linear.num_rows) + row;
  return {p.part_values + list * p.k, p.part_ids + list * p.k, p.part_counts + list, p.k};
}

// One chunk of panels for some rows, at most kThinRows: sums, bias, and what is kept of them.
template <typename Format>
void take_chunk(const LinearTopKParams& p, int64_t block_row, int64_t row, int64_t num_rows,
                int64_t panel, int64_t panel_end, int64_t part) {
  alignas(64) float sums[kThinRows * kChunkColumns];
  QuantizedLinearParams linear = p.linear;
  linear.input = floats_of(linear.input) + (block_row + row) * linear.input_row_stride;
  const int64_t first = panel * kPanelColumns;
  const int64_t num = std::min(panel_end * kPanelColumns, linear.out_features) - first;
  dispatch_rows<kThinRows>(num_rows, [&]<int Rows>() {
    run_thin<Format, Rows, thin_vecs(Rows)>(linear, panel, panel_end, {sums, kChunkColumns, num});
  });
  for (int64_t i = 0; i < num_rows; ++i) {
    float* values = sums + i * kChunkColumns;
    if (linear.bias != nullptr) {
      add_row(values, Row{linear.bias, linear.bias_dtype}.from(first), num);
    }
    list_of(p, part, row + i).add_all(values, num, first);
  }
}

// Parts [begin, end) of the columns for a block of rows, into the lists of part `begin`.
template <typename Format>
void take_parts(const LinearTopKParams& p, int64_t block_row, int64_t num_rows, int64_t num_parts,
                int64_t begin, int64_t end) {
  const int64_t num_panels = (p.linear.out_features + kPanelColumns - 1) / kPanelColumns;
  const int64_t num_chunks = (num_panels + kChunkPanels - 1) / kChunkPanels;
  const int64_t num_tiles = (num_rows + kThinRows - 1) / kThinRows;
  const int64_t panel_end = std::min(num_panels, end * num_chunks / num_parts * kChunkPanels);
  int64_t panel = begin * num_chunks / num_parts * kChunkPanels;
  for (; panel < panel_end; panel += kChunkPanels) {
    for (int64_t tile = 0; tile < num_tiles; ++tile) {
      const int64_t row = tile * num_rows / num_tiles;
      const int64_t row_end = (tile + 1) * num_rows / num_tiles;
      take_chunk<Format>(p, block_row, row, row_end - row, panel,
                         std::min(panel + kChunkPanels, panel_end), begin);
    }
  }
}

// Puts the lists of all parts together, in order.
void merge_parts(const LinearTopKParams& p, int64_t block_row, int64_t num_rows,
                 int64_t num_parts) {
  for (int64_t row = 0; row < num_rows; ++row) {
    int64_t count = 0;
    const int64_t at = (block_row + row) * p.k;
    BestColumns best{p.values + at, p.ids + at, &count, p.k};
    for (int64_t part = 0; part < num_parts; ++part) {
      const BestColumns list = list_of(p, part, row);
      for (int64_t i = 0; i < *list.count; ++i) best.add(list.values[i], list.ids[i]);
    }
  }
}

}  // namespace

void linear_top_k(const LinearTopKParams& params, ParallelFor parallel_for) {
  LinearTopKParams p = params;
  if (p.linear.num_rows == 0) return;
  prepare_input(p.linear, parallel_for);
  const int64_t num_chunks = (p.linear.out_features + kChunkColumns - 1) / kChunkColumns;
  const int64_t num_parts = std::min(num_chunks, kTopKParts);
  for (int64_t row = 0; row < p.linear.num_rows; row += kTopKBlockRows) {
    const int64_t num_rows = std::min(kTopKBlockRows, p.linear.num_rows - row);
    const int64_t fmas = num_rows * p.linear.in_features * p.linear.out_features;
    const int64_t grain = 1 + kMinFmasPerThread * num_parts / (fmas + 1);
    std::fill_n(p.part_counts, num_parts * std::min(kTopKBlockRows, p.linear.num_rows), 0);
    parallel_for(num_parts, grain, [&](int64_t begin, int64_t end) {
      dispatch_format(p.linear.format, [&]<typename Format>() {
        take_parts<Format>(p, row, num_rows, num_parts, begin, end);
      });
    });
    merge_parts(p, row, num_rows, num_parts);
  }
}

}  // namespace skv::cpu::SKV_ISA_NS
