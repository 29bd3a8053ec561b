// quantized_linear against double, and one row alone against the same row in a batch.
#include <cmath>
#include <cstring>
#include <string>

#include "tests/cpp/kernel_testing.h"

namespace skv {
namespace {

using QuantizedLinear = KernelTest;

struct Shape {
  WeightFormat format;
  int64_t num_rows;
  int64_t in_features;
  int64_t out_features;

  std::string text() const {
    return "format " + std::to_string(static_cast<int>(format)) + ", " + std::to_string(num_rows) +
           " rows, K " + std::to_string(in_features) + ", out " + std::to_string(out_features);
  }
};

// All arguments of one call, in arrays of exact size; columns of the last panel past `out` are NaN
// for float32 and garbage else, and must enter nothing.
class Layer {
 public:
  explicit Layer(const Shape& shape)
      : shape_(shape),
        num_panels_((shape.out_features + kPanelColumns - 1) / kPanelColumns),
        stride_(shape.in_features + 3),
        input_(random_floats((shape.num_rows - 1) * stride_ + shape.in_features, 1)),
        weight_(weight_bytes()),
        scales_(has_scales() ? random_floats(num_groups(), 2) : std::vector<float>{}),
        minimums_(has_minimums() ? random_floats(num_groups(), 3) : std::vector<float>{}),
        bias_(random_floats(shape.out_features, 4)),
        residual_(random_floats(shape.num_rows * shape.out_features, 5)) {
    std::mt19937 generator(6);
    for (int64_t i = 0; i < weight_.size(); ++i) weight_[i] = static_cast<uint8_t>(generator());
    if (shape.format == WeightFormat::kFloat32) fill_float_weight();
  }

  // Rows [first, first + count) as a call of their own.
  ExactArray<float> run(int64_t first, int64_t count, bool has_extras,
                        ParallelFor parallel_for) const {
    const int64_t out = shape_.out_features;
    ExactArray<float> output(count * out, std::nanf(""));
    cpu::kernels().quantized_linear(
        {.input = input_.data() + first * stride_,
         .weight = weight_.data(),
         .scales = has_scales() ? scales_.data() : nullptr,
         .minimums = has_minimums() ? minimums_.data() : nullptr,
         .bias = has_extras ? bias_.data() : nullptr,
         .residual = has_extras ? residual_.data() + first * out : nullptr,
         .norm_weight = nullptr,
         .float_input = nullptr,
         .sums = output.data(),
         .activated = nullptr,
         .format = shape_.format,
         .num_rows = count,
         .in_features = shape_.in_features,
         .out_features = out,
         .input_row_stride = stride_,
         .norm_epsilon = 0.0F},
        parallel_for);
    return output;
  }

  void expect_near_double(const ExactArray<float>& output, bool has_extras) const {
    const std::vector<double> weights = decoded();
    const int64_t depth = shape_.in_features;
    for (int64_t row = 0; row < shape_.num_rows; ++row) {
      for (int64_t column = 0; column < shape_.out_features; ++column) {
        const int64_t at = row * shape_.out_features + column;
        double sum = has_extras ? double{bias_[column]} + residual_[at] : 0.0;
        double size = has_extras ? std::abs(bias_[column]) + std::abs(residual_[at]) : 0.0;
        for (int64_t k = 0; k < depth; ++k) {
          const double term =
              input_[row * stride_ + k] * weights[static_cast<size_t>(column * depth + k)];
          sum += term;
          size += std::abs(term);
        }
        // Each step of the chain rounds a partial sum, which is at most `size`.
        ASSERT_NEAR(output[at], sum, (static_cast<double>(depth) + 4) * 0x1p-24 * size)
            << shape_.text() << " at [" << row << ", " << column << "]";
      }
    }
  }

 private:
  bool has_scales() const { return shape_.format != WeightFormat::kFloat32; }
  bool has_minimums() const { return shape_.format == WeightFormat::kInt4; }
  int64_t num_groups() const {
    return num_panels_ * (shape_.in_features / kGroupSize) * kPanelColumns;
  }
  int64_t weight_bytes() const {
    const int64_t count = num_panels_ * shape_.in_features * kPanelColumns;
    switch (shape_.format) {
      case WeightFormat::kFloat32:
        return 4 * count;
      case WeightFormat::kInt8:
        return count;
      case WeightFormat::kInt4:
        return count / 2;
    }
    return 0;
  }

  void fill_float_weight() {
    auto values = random_floats(weight_.size() / 4, 7);
    for (size_t i = 0; i < values.size(); ++i) {
      const auto panel = static_cast<int64_t>(i) / (shape_.in_features * kPanelColumns);
      const auto column = panel * kPanelColumns + static_cast<int64_t>(i) % kPanelColumns;
      if (column >= shape_.out_features) values[i] = std::nanf("");
    }
    if (!values.empty()) std::memcpy(weight_.data(), values.data(), 4 * values.size());
  }

  // The weights as [out, K], rounded to float32 as the format says.
  std::vector<double> decoded() const {
    std::vector<double> weights;
    for (int64_t column = 0; column < shape_.out_features; ++column) {
      for (int64_t k = 0; k < shape_.in_features; ++k) weights.push_back(decoded_at(column, k));
    }
    return weights;
  }

  float decoded_at(int64_t column, int64_t k) const {
    const int64_t panel = column / kPanelColumns;
    const int64_t lane = column % kPanelColumns;
    const int64_t at = (panel * shape_.in_features + k) * kPanelColumns + lane;
    const int64_t group =
        (panel * (shape_.in_features / kGroupSize) + k / kGroupSize) * kPanelColumns + lane;
    if (shape_.format == WeightFormat::kFloat32) {
      float value;
      std::memcpy(&value, weight_.data() + 4 * at, 4);
      return value;
    }
    if (shape_.format == WeightFormat::kInt8) {
      return static_cast<float>(static_cast<int8_t>(weight_[at])) * scales_[group];
    }
    const int64_t pair = panel * (shape_.in_features / 2) + k / 2;
    const int byte = weight_[pair * kPanelColumns + lane];
    const int nibble = k % 2 == 0 ? byte & 15 : byte >> 4;
    return std::fma(static_cast<float>(nibble), scales_[group], minimums_[group]);
  }

  Shape shape_;
  int64_t num_panels_;
  int64_t stride_;
  ExactArray<float> input_;
  ExactArray<uint8_t> weight_;
  ExactArray<float> scales_;
  ExactArray<float> minimums_;
  ExactArray<float> bias_;
  ExactArray<float> residual_;
};

bool same_bits(const float* a, const float* b, int64_t count) {
  return std::memcmp(a, b, static_cast<size_t>(count) * sizeof(float)) == 0;
}

void check(const Shape& shape) {
  const Layer layer(shape);
  const bool has_extras = shape.num_rows % 2 == 1 && shape.out_features != 17;
  const auto together = layer.run(0, shape.num_rows, has_extras, kSerial);
  layer.expect_near_double(together, has_extras);
  for (const ParallelFor parallel_for : {ParallelFor(kBackwards), ParallelFor(kThreePoolThreads)}) {
    const auto cut = layer.run(0, shape.num_rows, has_extras, parallel_for);
    EXPECT_TRUE(same_bits(cut.data(), together.data(), cut.size())) << shape.text();
  }
  for (int64_t row : {int64_t{0}, shape.num_rows / 2, shape.num_rows - 1}) {
    const auto alone = layer.run(row, 1, has_extras, kSerial);
    EXPECT_TRUE(same_bits(alone.data(), together.data() + row * shape.out_features, alone.size()))
        << shape.text() << ", row " << row;
  }
}

void check_shapes(WeightFormat format) {
  for (int64_t in_features : {32, 1536}) {
    for (int64_t num_rows : {1, 5, 13, 265}) {
      for (int64_t out_features : {1, 17, 100}) {
        // The largest one adds time and no path: a depth of 32 takes the same panels.
        if (in_features * num_rows * out_features > 20'000'000) continue;
        check({format, num_rows, in_features, out_features});
      }
    }
  }
}

TEST_F(QuantizedLinear, Float32) {
  check_shapes(WeightFormat::kFloat32);
  check({WeightFormat::kFloat32, 13, 45, 33});
  check({WeightFormat::kFloat32, 3, 1, 16});
}

TEST_F(QuantizedLinear, Int8) { check_shapes(WeightFormat::kInt8); }

TEST_F(QuantizedLinear, Int4) { check_shapes(WeightFormat::kInt4); }

TEST_F(QuantizedLinear, ASumOverNothingIsZero) {
  for (int64_t num_rows : {1, 13, 265}) {
    for (int64_t out_features : {1, 17, 100}) {
      check({WeightFormat::kFloat32, num_rows, 0, out_features});
    }
  }
}

TEST_F(QuantizedLinear, EveryThinHeight) {
  for (int64_t num_rows = 2; num_rows <= 14; ++num_rows) {
    for (const auto format : {WeightFormat::kFloat32, WeightFormat::kInt8, WeightFormat::kInt4}) {
      check({format, num_rows, 64, 149});
    }
  }
}

TEST_F(QuantizedLinear, NoRowsAndNoColumns) {
  const Layer layer({WeightFormat::kInt8, 1, 32, 17});
  EXPECT_EQ(layer.run(0, 0, false, kSerial).size(), 0);
  const Layer no_columns({WeightFormat::kInt8, 3, 32, 0});
  EXPECT_EQ(no_columns.run(0, 3, true, kSerial).size(), 0);
}

}  // namespace
}  // namespace skv
