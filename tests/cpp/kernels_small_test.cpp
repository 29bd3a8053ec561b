// The small CPU kernels against scalar loops.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "csrc/kernels/cpu/copy_pages.h"
#include "csrc/kernels/cpu/half.h"
#include "csrc/kernels/cpu/ngram_lookup.h"
#include "csrc/kernels/cpu/verify_draft.h"
#include "tests/cpp/kernel_testing.h"

namespace skv {
namespace {

using AppendKv = KernelTest;
using RopeAppendKv = KernelTest;
using RmsNorm = KernelTest;
using SiluMul = KernelTest;

// Pools of any dtype, as bytes filled with a pattern that no write leaves behind.
struct Pool {
  Pool(const KvLayout& layout, DType pool_dtype)
      : dtype(pool_dtype),
        bytes(static_cast<size_t>(layout.num_pages * layout.page_elements()) * size(), 0xFF) {}
  size_t size() const { return dtype == DType::kFloat32 ? 4 : 2; }
  void put(int64_t at, float value) {
    const uint16_t half =
        dtype == DType::kFloat16 ? cpu::float_to_half(value) : cpu::float_to_bfloat16(value);
    const void* source = dtype == DType::kFloat32 ? static_cast<const void*>(&value) : &half;
    std::memcpy(bytes.data() + static_cast<size_t>(at) * size(), source, size());
  }
  DType dtype;
  std::vector<uint8_t> bytes;
};

constexpr DType kDtypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};
constexpr KvLayout kLayouts[] = {{5, 2, 4, 16}, {3, 1, 1, 48}, {4, 3, 7, 256}, {2, 2, 3, 6}};
// Twice the same slot (the last row stays), a skipped row, both ends of the first pages.
const std::vector<int64_t> kSlots{2, 0, -1, 1, 2};
const int64_t kNumRows = static_cast<int64_t>(kSlots.size());

TEST_F(AppendKv, WritesRowsInOrder) {
  for (const KvLayout& layout : kLayouts) {
    const int64_t width = layout.num_kv_heads * layout.head_dim;
    const int64_t stride = width + 3;
    const auto key = random_floats(kNumRows * stride, 1);
    const auto value = random_floats(kNumRows * stride, 2);
    for (DType dtype : kDtypes) {
      Pool k(layout, dtype), v(layout, dtype), wanted_k(layout, dtype), wanted_v(layout, dtype);
      for (int64_t row = 0; row < kNumRows; ++row) {
        const int64_t slot = kSlots[static_cast<size_t>(row)];
        for (int64_t i = 0; i < width && slot >= 0; ++i) {
          const int64_t at = layout.slot_offset(slot, i / layout.head_dim) + i % layout.head_dim;
          wanted_k.put(at, key[static_cast<size_t>(row * stride + i)]);
          wanted_v.put(at, value[static_cast<size_t>(row * stride + i)]);
        }
      }
      const AppendKvParams params{.key = key.data(),
                                  .value = value.data(),
                                  .slots = kSlots.data(),
                                  .k_pool = k.bytes.data(),
                                  .v_pool = v.bytes.data(),
                                  .k_scales = nullptr,
                                  .v_scales = nullptr,
                                  .layout = layout,
                                  .source_dtype = DType::kFloat32,
                                  .kv_dtype = dtype,
                                  .num_rows = kNumRows,
                                  .key_row_stride = stride,
                                  .key_head_stride = layout.head_dim,
                                  .value_row_stride = stride,
                                  .value_head_stride = layout.head_dim};
      cpu::kernels().append_kv(params, kBackwards);
      EXPECT_EQ(k.bytes, wanted_k.bytes);
      EXPECT_EQ(v.bytes, wanted_v.bytes);
    }
  }
}

TEST_F(AppendKv, KeepsBitsOfThePoolsDtype) {
  const KvLayout layout{2, 1, 4, 16};
  std::vector<uint16_t> rows(static_cast<size_t>(kNumRows * 16));
  for (size_t i = 0; i < rows.size(); ++i) rows[i] = static_cast<uint16_t>(0x7C01 + 997 * i);
  for (DType dtype : {DType::kFloat16, DType::kBFloat16}) {
    Pool k(layout, dtype), v(layout, dtype);
    const AppendKvParams params{.key = rows.data(),
                                .value = rows.data(),
                                .slots = kSlots.data(),
                                .k_pool = k.bytes.data(),
                                .v_pool = v.bytes.data(),
                                .k_scales = nullptr,
                                .v_scales = nullptr,
                                .layout = layout,
                                .source_dtype = dtype,
                                .kv_dtype = dtype,
                                .num_rows = kNumRows,
                                .key_row_stride = 16,
                                .key_head_stride = 16,
                                .value_row_stride = 16,
                                .value_head_stride = 16};
    cpu::kernels().append_kv(params, kSerial);
    EXPECT_EQ(0, std::memcmp(k.bytes.data() + 2 * 32, rows.data() + 4 * 16, 32));
    EXPECT_EQ(0, std::memcmp(v.bytes.data(), rows.data() + 16, 32));
    EXPECT_EQ(k.bytes[3 * 32], 0xFF);  // slot 3 was not written
  }
}

TEST_F(RopeAppendKv, RotatesQueriesAndWritesRotatedKeys) {
  const std::vector<int32_t> positions{3, 0, 1, 8, 8};
  for (const KvLayout& layout : kLayouts) {
    const int64_t head_dim = layout.head_dim;
    const int64_t half = head_dim / 2;
    const int64_t num_heads = 2 * layout.num_kv_heads;
    const int64_t query_width = num_heads * head_dim;
    const int64_t width = layout.num_kv_heads * head_dim;
    const int64_t stride = query_width + 2 * width;  // one fused projection
    const auto cos_sin = random_floats(9 * head_dim, 3);
    const auto original = random_floats(kNumRows * stride, 4);
    const auto rotated = [&](int64_t row, int64_t start, int64_t i) {
      const float* x = original.data() + row * stride + start;
      const float* angle = cos_sin.data() + positions[static_cast<size_t>(row)] * head_dim;
      const float c = angle[i % half];
      const float s = angle[half + i % half];
      return i < half ? x[i] * c - x[i + half] * s : x[i] * c + x[i - half] * s;
    };
    for (DType dtype : kDtypes) {
      auto fused = original;
      auto wanted = original;
      Pool k(layout, dtype), v(layout, dtype), wanted_k(layout, dtype), wanted_v(layout, dtype);
      for (int64_t row = 0; row < kNumRows; ++row) {
        for (int64_t i = 0; i < query_width; ++i) {
          wanted[static_cast<size_t>(row * stride + i)] =
              rotated(row, i / head_dim * head_dim, i % head_dim);
        }
        const int64_t slot = kSlots[static_cast<size_t>(row)];
        for (int64_t i = 0; i < width && slot >= 0; ++i) {
          const int64_t head = i / head_dim;
          const int64_t at = layout.slot_offset(slot, head) + i % head_dim;
          wanted_k.put(at, rotated(row, query_width + head * head_dim, i % head_dim));
          wanted_v.put(at, original[static_cast<size_t>(row * stride + query_width + width + i)]);
        }
      }
      const RopeAppendKvParams params{.query = fused.data(),
                                      .key = fused.data() + query_width,
                                      .value = fused.data() + query_width + width,
                                      .positions = positions.data(),
                                      .cos_sin = cos_sin.data(),
                                      .slots = kSlots.data(),
                                      .k_pool = k.bytes.data(),
                                      .v_pool = v.bytes.data(),
                                      .k_scales = nullptr,
                                      .v_scales = nullptr,
                                      .layout = layout,
                                      .activation_dtype = DType::kFloat32,
                                      .kv_dtype = dtype,
                                      .num_rows = kNumRows,
                                      .num_heads = num_heads,
                                      .query_row_stride = stride,
                                      .query_head_stride = head_dim,
                                      .key_row_stride = stride,
                                      .key_head_stride = head_dim,
                                      .value_row_stride = stride,
                                      .value_head_stride = head_dim};
      cpu::kernels().rope_append_kv(params, kBackwards);
      EXPECT_EQ(fused, wanted);
      EXPECT_EQ(k.bytes, wanted_k.bytes);
      EXPECT_EQ(v.bytes, wanted_v.bytes);
    }
  }
}

TEST(CopyPages, CopiesEveryLayerInOrder) {
  constexpr int64_t kLayers = 3, kPages = 4, kPageBytes = 10;
  std::vector<uint8_t> k(kLayers * kPages * kPageBytes);
  for (size_t i = 0; i < k.size(); ++i) k[i] = static_cast<uint8_t>(i);
  auto v = k;
  std::reverse(v.begin(), v.end());
  auto wanted_k = k, wanted_v = v;
  const std::vector<int32_t> copies{0, 1, 1, 3, 2, 2};
  for (auto* pool : {&wanted_k, &wanted_v}) {
    for (int64_t layer = 0; layer < kLayers; ++layer) {
      auto page = pool->begin() + layer * kPages * kPageBytes;
      for (int to : {1, 3}) std::copy_n(page, kPageBytes, page + to * kPageBytes);
    }
  }
  // The scales: the same copies of smaller pages.
  constexpr int64_t kScaleBytes = 4;
  std::vector<uint8_t> k_scales(k.begin(), k.begin() + kLayers * kPages * kScaleBytes);
  auto v_scales = k_scales;
  std::reverse(v_scales.begin(), v_scales.end());
  auto wanted_k_scales = k_scales, wanted_v_scales = v_scales;
  for (auto* scales : {&wanted_k_scales, &wanted_v_scales}) {
    for (size_t layer = 0; layer < kLayers; ++layer) {
      uint8_t* pages = scales->data() + layer * kPages * kScaleBytes;
      std::memcpy(pages + 1 * kScaleBytes, pages, kScaleBytes);
      std::memcpy(pages + 3 * kScaleBytes, pages + 1 * kScaleBytes, kScaleBytes);
    }
  }
  CopyPagesParams params{.page_copies = copies.data(),
                         .k_pool = k.data(),
                         .v_pool = v.data(),
                         .k_scales = k_scales.data(),
                         .v_scales = v_scales.data(),
                         .num_copies = 3,
                         .num_layers = kLayers,
                         .num_pages = kPages,
                         .page_bytes = kPageBytes,
                         .scale_bytes = kScaleBytes};
  cpu::copy_pages(params, kBackwards);
  EXPECT_EQ(k, wanted_k);
  EXPECT_EQ(v, wanted_v);
  EXPECT_EQ(k_scales, wanted_k_scales);
  EXPECT_EQ(v_scales, wanted_v_scales);
  params.num_copies = 0;
  cpu::copy_pages(params, kBackwards);
  EXPECT_EQ(k, wanted_k);
  EXPECT_EQ(k_scales, wanted_k_scales);
}

TEST_F(RmsNorm, MatchesDoubleAndKeepsBitsInAnyBatch) {
  for (int64_t features : {1, 3, 16, 37, 64, 576, 1000}) {
    constexpr int64_t kOuter = 3, kInner = 2;
    const int64_t inner_stride = features + 1;
    const int64_t outer_stride = 3 * inner_stride;
    const auto x = random_floats(kOuter * outer_stride, 5, 3.0F);
    const auto weight = random_floats(features, 6);
    std::vector<float> y(static_cast<size_t>(kOuter * kInner * features));
    const RmsNormParams params{
        .input = x.data(),
        .weight = weight.data(),
        .output = y.data(),
        .residual = nullptr,
        .sum = nullptr,
        .activation_dtype = DType::kFloat32,
        .num_rows = kOuter * kInner,
        .num_features = features,
        .inner_rows = kInner,
        .inner_stride = inner_stride,
        .outer_stride = outer_stride,
        .epsilon = 1e-5F,
    };
    cpu::kernels().rms_norm(params, kBackwards);
    for (int64_t row = 0; row < kOuter * kInner; ++row) {
      const float* input = x.data() + row / kInner * outer_stride + row % kInner * inner_stride;
      const float* output = y.data() + row * features;
      double sum = 0;
      for (int64_t i = 0; i < features; ++i) sum += double{input[i]} * input[i];
      const double factor = 1 / std::sqrt(sum / static_cast<double>(features) + 1e-5);
      for (int64_t i = 0; i < features; ++i) {
        const double wanted = input[i] * factor * weight[static_cast<size_t>(i)];
        EXPECT_NEAR(output[i], wanted, 2e-6 * std::abs(wanted) + 1e-12);
      }
      std::vector<float> alone(static_cast<size_t>(features));
      RmsNormParams one = params;
      one.input = input;
      one.output = alone.data();
      one.num_rows = one.inner_rows = 1;
      cpu::kernels().rms_norm(one, kSerial);
      EXPECT_TRUE(std::equal(alone.begin(), alone.end(), output));
    }
  }
}

TEST_F(RmsNorm, NormalisesTheSumWithTheResidual) {
  for (int64_t features : {1, 3, 16, 37, 64, 576}) {
    constexpr int64_t kRows = 4;
    const int64_t stride = features + 2;
    const int64_t count = kRows * features;
    const auto x = random_floats(kRows * stride, 11);
    const auto weight = random_floats(features, 12);
    const auto before = random_floats(count, 13);
    ExactArray<float> sum(count, 0.0F);
    ExactArray<float> y(count, -1.0F);
    RmsNormParams params{
        .input = x.data(),
        .weight = weight.data(),
        .output = y.data(),
        .residual = before.data(),
        .sum = sum.data(),
        .activation_dtype = DType::kFloat32,
        .num_rows = kRows,
        .num_features = features,
        .inner_rows = kRows,
        .inner_stride = stride,
        .outer_stride = 0,
        .epsilon = 1e-5F,
    };
    cpu::kernels().rms_norm(params, kBackwards);
    std::vector<float> sums(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) {
      sums[static_cast<size_t>(i)] = before[static_cast<size_t>(i)] +
                                     x[static_cast<size_t>(i / features * stride + i % features)];
    }
    EXPECT_TRUE(std::equal(sums.begin(), sums.end(), sum.data()));
    std::vector<float> wanted(static_cast<size_t>(count));
    params.input = sums.data();
    params.output = wanted.data();
    params.residual = nullptr;
    params.inner_stride = features;
    cpu::kernels().rms_norm(params, kSerial);
    EXPECT_TRUE(std::equal(wanted.begin(), wanted.end(), y.data()));
  }
}

TEST_F(SiluMul, MatchesDoubleFarOutToo) {
  for (int64_t features : {1, 7, 16, 45, 128}) {
    auto input = random_floats(2 * 2 * features, 7, 30.0F);
    input[0] = -1e5F;
    std::vector<float> y(static_cast<size_t>(2 * features));
    cpu::kernels().silu_mul({input.data(), y.data(), DType::kFloat32, 2, features, 2 * features},
                            kBackwards);
    for (int64_t i = 0; i < 2 * features; ++i) {
      const auto at = static_cast<size_t>(i / features * 2 * features + i % features);
      const double gate = input[at];
      const double wanted =
          gate / (1 + std::exp(-gate)) * input[at + static_cast<size_t>(features)];
      // The exponential is cut to 0 below e^-87.33.
      EXPECT_NEAR(y[static_cast<size_t>(i)], wanted, 2e-6 * std::abs(wanted) + 1e-33);
    }
  }
  const float infinity = std::numeric_limits<float>::infinity();
  const float special[] = {infinity, std::nanf(""), -3e38F, 1, 1, 1};
  float y[3];
  cpu::kernels().silu_mul({special, y, DType::kFloat32, 1, 3, 6}, kSerial);
  EXPECT_EQ(y[0], infinity);
  EXPECT_TRUE(std::isnan(y[1]));
  EXPECT_EQ(y[2], 0);
}

// The rule said again: longest suffix first, latest occurrence first.
std::vector<int32_t> naive_draft(const std::vector<int32_t>& text, int64_t min_n, int64_t max_n,
                                 int64_t max_draft) {
  const int64_t size = static_cast<int64_t>(text.size());
  for (int64_t n = std::min(max_n, size - 1); n >= min_n; --n) {
    for (int64_t start = size - n - 1; start >= 0; --start) {
      if (!std::equal(text.end() - n, text.end(), text.begin() + start)) continue;
      std::vector<int32_t> draft(text.begin() + start + n, text.end());
      const size_t period = draft.size();
      while (start + n > size - n && static_cast<int64_t>(draft.size()) < max_draft) {
        draft.push_back(draft[draft.size() - period]);
      }
      draft.resize(std::min(draft.size(), static_cast<size_t>(max_draft)));
      return draft;
    }
  }
  return {};
}

template <typename Token>
void check_lookup(const std::vector<std::vector<int32_t>>& texts, int64_t min_n, int64_t max_n,
                  int64_t max_draft) {
  std::vector<Token> tokens;
  std::vector<int32_t> offsets{0};
  for (const auto& text : texts) {
    tokens.insert(tokens.end(), text.begin(), text.end());
    offsets.push_back(static_cast<int32_t>(tokens.size()));
  }
  const int64_t count = static_cast<int64_t>(texts.size());
  std::vector<int32_t> drafts(texts.size() * static_cast<size_t>(max_draft), 77);
  std::vector<int32_t> num_draft(texts.size(), 77);
  cpu::ngram_lookup({tokens.data(), offsets.data(), drafts.data(), num_draft.data(),
                     sizeof(Token) == 8, count, min_n, max_n, max_draft},
                    kBackwards);
  for (size_t s = 0; s < texts.size(); ++s) {
    auto wanted = naive_draft(texts[s], min_n, max_n, max_draft);
    ASSERT_EQ(num_draft[s], static_cast<int32_t>(wanted.size()));
    wanted.resize(static_cast<size_t>(max_draft), -1);
    const auto row = drafts.begin() + static_cast<int64_t>(s) * max_draft;
    ASSERT_EQ(std::vector<int32_t>(row, row + max_draft), wanted);
  }
}

TEST(NgramLookup, MatchesTheNaiveRule) {
  std::mt19937 generator(8);
  std::vector<std::vector<int32_t>> texts{{}, {1}, {1, 1}, {5, 5, 5, 5}, {1, 2, 1, 2, 1}};
  for (int length = 0; length < 120; ++length) {
    std::vector<int32_t> text(static_cast<size_t>(length % 40));
    for (int32_t& token : text) token = static_cast<int32_t>(generator() % 3);
    texts.push_back(text);
  }
  for (auto [min_n, max_n] : {std::pair{1, 1}, {1, 3}, {2, 8}, {3, 64}}) {
    check_lookup<int32_t>(texts, min_n, max_n, 5);
    check_lookup<int64_t>(texts, min_n, max_n, 12);
    check_lookup<int64_t>(texts, min_n, max_n, 0);
  }
}

template <typename Id>
void check_verify() {
  // Three sequences: all accepted, no draft, refused at the second token.
  const std::vector<Id> draft{4, 5, 6, 7, 8};
  const std::vector<Id> target{4, 5, 9, 3, 6, 1, 8, 2};
  const std::vector<int32_t> offsets{0, 2, 2, 5};
  std::vector<int32_t> accepted(3, 77);
  std::vector<Id> bonus(3, 77);
  cpu::verify_draft({draft.data(), target.data(), offsets.data(), accepted.data(), bonus.data(),
                     sizeof(Id) == 8, 3},
                    kBackwards);
  EXPECT_EQ(accepted, (std::vector<int32_t>{2, 0, 1}));
  EXPECT_EQ(bonus, (std::vector<Id>{9, 3, 1}));
}

TEST(VerifyDraft, AcceptsTheLongestAgreeingRun) {
  check_verify<int32_t>();
  check_verify<int64_t>();
}

}  // namespace
}  // namespace skv
