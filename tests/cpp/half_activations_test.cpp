// Kernels on float16 and bfloat16 activations against the same kernels on the widened numbers, in
// arrays of exact size.
#include <cmath>
#include <cstdint>
#include <vector>

#include "csrc/kernels/cpu/half.h"
#include "tests/cpp/kernel_testing.h"

namespace skv {
namespace {

using HalfActivations = KernelTest;

constexpr DType kHalves[] = {DType::kFloat16, DType::kBFloat16};

uint16_t narrow(float value, DType dtype) {
  return dtype == DType::kFloat16 ? cpu::float_to_half(value) : cpu::float_to_bfloat16(value);
}
float widen(uint16_t value, DType dtype) {
  return dtype == DType::kFloat16 ? cpu::half_to_float(value) : cpu::bfloat16_to_float(value);
}

// Random numbers in 16 bits, and the same in float32.
struct Numbers {
  Numbers(int64_t count, uint32_t seed, DType number_dtype)
      : dtype(number_dtype), narrow_ones(count), wide_ones(random_floats(count, seed)) {
    for (int64_t i = 0; i < count; ++i) {
      narrow_ones[i] = narrow(wide_ones[i], dtype);
      wide_ones[i] = widen(narrow_ones[i], dtype);
    }
  }
  DType dtype;
  ExactArray<uint16_t> narrow_ones;
  ExactArray<float> wide_ones;
};

// Places for results in 16 bits and in float32.
struct Results {
  explicit Results(int64_t count) : narrow_ones(count, 0xFFFF), wide_ones(count, std::nanf("")) {}

  void expect_rounded(DType dtype, const char* what) const {
    for (int64_t i = 0; i < wide_ones.size(); ++i) {
      ASSERT_EQ(narrow_ones[i], narrow(wide_ones[i], dtype)) << what << " at " << i;
    }
  }

  ExactArray<uint16_t> narrow_ones;
  ExactArray<float> wide_ones;
};

TEST_F(HalfActivations, RmsNormWithWeightsOfEitherDtype) {
  for (const DType dtype : kHalves) {
    for (const int64_t features : {1, 17, 64, 256, 300}) {
      constexpr int64_t kRows = 3;
      const Numbers x(kRows * features, 1, dtype);
      const Numbers weight(features, 2, dtype);
      Results y(kRows * features);
      RmsNormParams params{
          .input = x.wide_ones.data(),
          .weight = weight.wide_ones.data(),
          .output = y.wide_ones.data(),
          .residual = nullptr,
          .sum = nullptr,
          .activation_dtype = DType::kFloat32,
          .num_rows = kRows,
          .num_features = features,
          .inner_rows = kRows,
          .inner_stride = features,
          .outer_stride = 0,
          .epsilon = 1e-5F,
      };
      cpu::kernels().rms_norm(params, kSerial);
      params.input = x.narrow_ones.data();
      params.output = y.narrow_ones.data();
      params.activation_dtype = dtype;
      cpu::kernels().rms_norm(params, kBackwards);
      y.expect_rounded(dtype, "float32 weight");
      params.weight = weight.narrow_ones.data();
      params.weight_dtype = dtype;
      cpu::kernels().rms_norm(params, kBackwards);
      y.expect_rounded(dtype, "16-bit weight");
    }
  }
}

TEST_F(HalfActivations, RmsNormOfTheRoundedSum) {
  for (const DType dtype : kHalves) {
    const int64_t features = 261;
    const Numbers x(features, 1, dtype);
    const Numbers residual(features, 2, dtype);
    Numbers sum(features, 4, dtype);
    const ExactArray<float> weight(random_floats(features, 3));
    Results y(features);
    RmsNormParams params{
        .input = x.narrow_ones.data(),
        .weight = weight.data(),
        .output = y.narrow_ones.data(),
        .residual = residual.narrow_ones.data(),
        .sum = sum.narrow_ones.data(),
        .activation_dtype = dtype,
        .num_rows = 1,
        .num_features = features,
        .inner_rows = 1,
        .inner_stride = features,
        .outer_stride = 0,
        .epsilon = 1e-5F,
    };
    cpu::kernels().rms_norm(params, kSerial);
    for (int64_t i = 0; i < features; ++i) {
      const uint16_t expected = narrow(residual.wide_ones[i] + x.wide_ones[i], dtype);
      ASSERT_EQ(sum.narrow_ones[i], expected);
      sum.wide_ones[i] = widen(expected, dtype);
    }
    params.input = sum.wide_ones.data();
    params.output = y.wide_ones.data();
    params.residual = nullptr;
    params.activation_dtype = DType::kFloat32;
    cpu::kernels().rms_norm(params, kSerial);
    y.expect_rounded(dtype, "normalised");
  }
}

TEST_F(HalfActivations, SiluMulAndArgmax) {
  for (const DType dtype : kHalves) {
    for (const int64_t features : {1, 15, 64, 259}) {
      const Numbers x(2 * features, 1, dtype);
      Results y(features);
      cpu::kernels().silu_mul(
          {x.wide_ones.data(), y.wide_ones.data(), DType::kFloat32, 1, features, 2 * features},
          kSerial);
      cpu::kernels().silu_mul(
          {x.narrow_ones.data(), y.narrow_ones.data(), dtype, 1, features, 2 * features}, kSerial);
      y.expect_rounded(dtype, "silu_mul");
      int64_t ids[2] = {-1, -2};
      float values[2] = {-1.0F, -2.0F};
      const int64_t count = 2 * features;
      cpu::kernels().argmax({x.wide_ones.data(), ids, values, DType::kFloat32, 1, count, count},
                            kSerial);
      cpu::kernels().argmax({x.narrow_ones.data(), ids + 1, values + 1, dtype, 1, count, count},
                            kSerial);
      EXPECT_EQ(ids[0], ids[1]);
      EXPECT_EQ(values[0], values[1]);
    }
  }
}

struct Int8Pools {
  explicit Int8Pools(int64_t size) : k(size), v(size), k_scales(2), v_scales(2) {}
  ExactArray<int8_t> k;
  ExactArray<int8_t> v;
  ExactArray<float> k_scales;
  ExactArray<float> v_scales;
};

TEST_F(HalfActivations, RopeAppendKvIntoPoolsOfInt8) {
  for (const DType dtype : kHalves) {
    for (const int64_t head_dim : {2, 30, 128}) {
      Numbers q(head_dim, 1, dtype);
      const Numbers k(head_dim, 2, dtype);
      const Numbers v(head_dim, 3, dtype);
      const ExactArray<float> cos_sin(random_floats(head_dim, 4));
      const int32_t position = 0;
      const int64_t slot = 1;
      Int8Pools wide(2 * head_dim);
      Int8Pools narrow_pools(2 * head_dim);
      const auto run = [&](void* query, const void* key, const void* value, DType activations,
                           Int8Pools& pools) {
        cpu::kernels().rope_append_kv({.query = query,
                                       .key = key,
                                       .value = value,
                                       .positions = &position,
                                       .cos_sin = cos_sin.data(),
                                       .slots = &slot,
                                       .k_pool = pools.k.data(),
                                       .v_pool = pools.v.data(),
                                       .k_scales = pools.k_scales.data(),
                                       .v_scales = pools.v_scales.data(),
                                       .layout = {1, 1, 2, head_dim},
                                       .activation_dtype = activations,
                                       .kv_dtype = DType::kInt8,
                                       .num_rows = 1,
                                       .num_heads = 1,
                                       .query_row_stride = head_dim,
                                       .query_head_stride = head_dim,
                                       .key_row_stride = head_dim,
                                       .key_head_stride = head_dim,
                                       .value_row_stride = head_dim,
                                       .value_head_stride = head_dim},
                                      kSerial);
      };
      run(q.wide_ones.data(), k.wide_ones.data(), v.wide_ones.data(), DType::kFloat32, wide);
      run(q.narrow_ones.data(), k.narrow_ones.data(), v.narrow_ones.data(), dtype, narrow_pools);
      for (int64_t i = 0; i < head_dim; ++i) {
        ASSERT_EQ(q.narrow_ones[i], narrow(q.wide_ones[i], dtype)) << "q at " << i;
      }
      for (int64_t i = 0; i < 2 * head_dim; ++i) {
        ASSERT_EQ(narrow_pools.k[i], wide.k[i]) << "k at " << i;
        ASSERT_EQ(narrow_pools.v[i], wide.v[i]) << "v at " << i;
      }
      EXPECT_EQ(narrow_pools.k_scales[1], wide.k_scales[1]);
      EXPECT_EQ(narrow_pools.v_scales[1], wide.v_scales[1]);
    }
  }
}

TEST_F(HalfActivations, PagedAttention) {
  constexpr int64_t kHeadDim = 32;
  constexpr int64_t kPages = 3;
  for (const DType dtype : kHalves) {
    const Numbers query(2 * kHeadDim, 1, dtype);
    const ExactArray<float> keys(random_floats(kPages * 16 * kHeadDim, 2));
    const ExactArray<float> values(random_floats(kPages * 16 * kHeadDim, 3));
    const int32_t pages[kPages] = {2, 0, 1};
    const int32_t length = 40;
    const int32_t offsets[2] = {0, 1};
    Results output(2 * kHeadDim);
    const auto run = [&](const void* q, void* out, DType activations) {
      cpu::kernels().paged_attention({.query = q,
                                      .k_pool = keys.data(),
                                      .v_pool = values.data(),
                                      .k_scales = nullptr,
                                      .v_scales = nullptr,
                                      .page_table = pages,
                                      .seq_lens = &length,
                                      .query_offsets = offsets,
                                      .output = out,
                                      .layout = {kPages, 1, 16, kHeadDim},
                                      .activation_dtype = activations,
                                      .kv_dtype = DType::kFloat32,
                                      .num_sequences = 1,
                                      .num_rows = 2,  // the last one belongs to no sequence
                                      .num_heads = 1,
                                      .max_pages = kPages,
                                      .query_row_stride = kHeadDim,
                                      .query_head_stride = kHeadDim,
                                      .page_table_row_stride = kPages,
                                      .scale = 0.2F,
                                      .sliding_window = 0,
                                      .soft_cap = 0.0F},
                                     kSerial);
    };
    run(query.wide_ones.data(), output.wide_ones.data(), DType::kFloat32);
    run(query.narrow_ones.data(), output.narrow_ones.data(), dtype);
    output.expect_rounded(dtype, "attention");
  }
}

TEST_F(HalfActivations, QuantizedLinear) {
  constexpr int64_t kDepth = 24;
  for (const DType dtype : kHalves) {
    for (const int64_t rows : {1, 13}) {
      for (const int64_t out : {5, 32}) {
        const Numbers x(rows * kDepth, 1, dtype);
        const ExactArray<float> weight(random_floats((out + 15) / 16 * kDepth * 16, 2));
        const Numbers bias(out, 3, dtype);
        const Numbers residual(rows * out, 4, dtype);
        const Numbers norm(kDepth, 5, dtype);
        ExactArray<float> float_input(rows * kDepth);
        ExactArray<float> sums(rows * out);
        Results y(rows * out);
        QuantizedLinearParams params{};
        params.weight = weight.data();
        params.format = WeightFormat::kFloat32;
        params.num_rows = rows;
        params.in_features = params.input_row_stride = kDepth;
        params.out_features = out;
        params.float_input = float_input.data();
        for (const bool has_extras : {false, true}) {
          QuantizedLinearParams wide = params;
          wide.input = x.wide_ones.data();
          wide.sums = y.wide_ones.data();
          QuantizedLinearParams half = params;
          half.input = x.narrow_ones.data();
          half.sums = sums.data();
          half.rounded = y.narrow_ones.data();
          half.activation_dtype = dtype;
          if (has_extras) {
            wide.bias = bias.wide_ones.data();
            wide.residual = residual.wide_ones.data();
            wide.norm_weight = norm.wide_ones.data();
            half.bias = bias.narrow_ones.data();
            half.residual = residual.narrow_ones.data();
            half.norm_weight = norm.narrow_ones.data();
            half.bias_dtype = half.norm_weight_dtype = dtype;
          }
          cpu::kernels().quantized_linear(wide, kSerial);
          cpu::kernels().quantized_linear(half, kThreePoolThreads);
          y.expect_rounded(dtype, has_extras ? "linear with extras" : "linear");
        }
      }
    }
  }
}

}  // namespace
}  // namespace skv
