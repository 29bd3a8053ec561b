// linear_top_k against a sort of what quantized_linear gives.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "tests/cpp/kernel_testing.h"

namespace skv {
namespace {

using LinearTopK = KernelTest;

constexpr int64_t kDepth = 24;

// A float32 layer in arrays of exact size. A bias of few values makes ties, NaN and infinities.
struct Layer {
  int64_t num_rows;
  int64_t out_features;
  int64_t num_panels = (out_features + kPanelColumns - 1) / kPanelColumns;
  ExactArray<float> input{random_floats(num_rows * kDepth, 1)};
  ExactArray<float> weight{random_floats(num_panels * kDepth * kPanelColumns, 2)};
  ExactArray<float> bias{out_features};

  QuantizedLinearParams params(float* sums) const {
    QuantizedLinearParams p{};
    p.input = input.data();
    p.weight = weight.data();
    p.bias = bias.data();
    p.sums = sums;
    p.format = WeightFormat::kFloat32;
    p.num_rows = num_rows;
    p.in_features = kDepth;
    p.out_features = out_features;
    p.input_row_stride = kDepth;
    return p;
  }
};

void check(const Layer& layer, int64_t k) {
  const int64_t out = layer.out_features;
  ExactArray<float> sums(layer.num_rows * out);
  cpu::kernels().quantized_linear(layer.params(sums.data()), kSerial);
  const int64_t num_lists = kTopKParts * std::min(kTopKBlockRows, layer.num_rows);
  for (const ParallelFor parallel_for :
       {ParallelFor(kSerial), ParallelFor(kBackwards), ParallelFor(kThreePoolThreads)}) {
    ExactArray<int64_t> ids(layer.num_rows * k, -1);
    ExactArray<float> values(layer.num_rows * k);
    ExactArray<float> part_values(num_lists * k, std::nanf(""));
    ExactArray<int64_t> part_ids(num_lists * k, -1);
    ExactArray<int64_t> part_counts(num_lists, -1);
    cpu::kernels().linear_top_k({.linear = layer.params(nullptr),
                                 .k = k,
                                 .ids = ids.data(),
                                 .values = values.data(),
                                 .part_values = part_values.data(),
                                 .part_ids = part_ids.data(),
                                 .part_counts = part_counts.data()},
                                parallel_for);
    for (int64_t row = 0; row < layer.num_rows; ++row) {
      const float* sum = sums.data() + row * out;
      std::vector<int64_t> order(static_cast<size_t>(out));
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(), [sum](int64_t a, int64_t b) {
        return sum[a] > sum[b] || (std::isnan(sum[a]) && !std::isnan(sum[b]));
      });
      for (int64_t i = 0; i < k; ++i) {
        const int64_t wanted = order[static_cast<size_t>(i)];
        ASSERT_EQ(ids[row * k + i], wanted) << "row " << row << ", place " << i << ", out " << out;
        ASSERT_EQ(std::memcmp(&values[row * k + i], sum + wanted, sizeof(float)), 0);
      }
    }
  }
}

TEST_F(LinearTopK, EqualsASortOfAllOutputs) {
  for (int64_t num_rows : {1, 2, 12, 13, 50}) {
    for (int64_t out_features : {1, 17, 128, 1000, 20000}) {
      if (num_rows > 2 && out_features == 20000) continue;
      const Layer layer{num_rows, out_features};
      for (int64_t k : {1, 5, 64}) check(layer, std::min(k, out_features));
    }
  }
}

TEST_F(LinearTopK, TiesNanAndInfinities) {
  const float infinity = std::numeric_limits<float>::infinity();
  for (int64_t out_features : {17, 129, 3000}) {
    Layer layer{3, out_features};
    std::fill_n(layer.weight.data(), layer.weight.size(), 0.0F);
    for (int64_t k : {1, 5, 16}) {
      for (int64_t c = 0; c < out_features; ++c) layer.bias[c] = static_cast<float>(c * 7 % 5);
      check(layer, k);
      layer.bias[out_features / 2] = infinity;
      layer.bias[1] = -infinity;
      layer.bias[out_features - 1] = layer.bias[2] = std::nanf("");
      check(layer, k);
      std::fill_n(layer.bias.data(), out_features, -infinity);
      check(layer, k);
    }
  }
}

TEST_F(LinearTopK, NoRows) { check(Layer{0, 20}, 3); }

}  // namespace
}  // namespace skv
