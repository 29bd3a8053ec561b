// sample against a sorted list, and the weights it draws by.
#include "csrc/kernels/cpu/sample.h"

#include <cmath>
#include <limits>
#include <numeric>

#include "csrc/kernels/sample_rule.h"
#include "tests/cpp/kernel_testing.h"

namespace skv {
namespace {

using Sample = KernelTest;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

uint64_t weight_of(float logit, float top, float inverse_temperature) {
  return static_cast<uint64_t>(
      sample_weight(Rounded{logit}, Rounded{top}, Rounded{inverse_temperature}).v);
}

int64_t naive_sample(const std::vector<float>& row, const SampleRule& rule, uint64_t bits) {
  const float top = *std::max_element(row.begin(), row.end());
  std::vector<size_t> ids(row.size());
  std::iota(ids.begin(), ids.end(), size_t{0});
  std::stable_sort(ids.begin(), ids.end(), [&](size_t a, size_t b) { return row[a] > row[b]; });
  if (rule.is_greedy) return static_cast<int64_t>(ids[0]);
  const auto weight = [&](size_t id) { return weight_of(row[id], top, rule.inverse_temperature); };
  const auto total = [&] {
    uint64_t sum = 0;
    for (const size_t id : ids) sum += weight(id);
    return sum;
  };
  const auto k = static_cast<size_t>(rule.top_k);
  if (k > 0 && k < ids.size()) ids.resize(k);
  if (rule.top_p < 1.0F) {
    const uint64_t target = top_p_target(rule.top_p, total());
    uint64_t sum = 0;
    size_t num = 0;
    while (sum < target) sum += weight(ids[num++]);
    ids.resize(num);
  }
  std::erase_if(ids, [&](size_t id) { return weight(id) < rule.min_weight; });
  std::sort(ids.begin(), ids.end());
  const uint64_t target = draw_target(bits, total());
  uint64_t sum = 0;
  for (const size_t id : ids) {
    sum += weight(id);
    if (sum > target) return static_cast<int64_t>(id);
  }
  return -1;
}

struct Settings {
  float temperature;
  int32_t top_k;
  float top_p;
  float min_p;
};
const std::vector<Settings> kSettings = {
    {1.0F, 0, 1.0F, 0.0F},   {0.7F, 0, 0.9F, 0.0F},  {0.7F, 5, 1.0F, 0.0F},
    {0.9F, 40, 0.8F, 0.05F}, {5.0F, 0, 0.95F, 0.0F}, {100.0F, 0, 0.5F, 0.0F},
    {1.0F, 0, 1.0F, 0.3F},   {0.0F, 3, 0.5F, 0.5F},  {1e-40F, 9, 0.5F, 0.F},
    {3e38F, 9, 0.5F, 0.0F},  {1.0F, 200, 0.0F, 1.0F}};

// One column of the settings, of exactly the size that may be read.
template <typename T>
ExactArray<T> column(T Settings::* field) {
  ExactArray<T> values(static_cast<int64_t>(kSettings.size()));
  for (size_t i = 0; i < kSettings.size(); ++i) {
    values[static_cast<int64_t>(i)] = kSettings[i].*field;
  }
  return values;
}

TEST_F(Sample, DrawsWhatASortedListDraws) {
  const auto rows = static_cast<int64_t>(kSettings.size());
  for (int64_t count : {1, 2, 15, 63, 64, 65, 129, 1000, 20000}) {
    const int64_t stride = count + 5;
    ExactArray<float> logits((rows - 1) * stride + count, kInfinity);
    std::vector<std::vector<float>> separate;
    ExactArray<int64_t> seeds(rows), positions(rows);
    for (int64_t r = 0; r < rows; ++r) {
      auto row = random_floats(count, static_cast<uint32_t>(31 * count + r), 3.0F);
      if (r % 3 == 1) std::transform(row.begin(), row.end(), row.begin(), roundf);
      if (r % 4 == 3) std::fill(row.begin(), row.begin() + count / 2, -kInfinity);
      std::copy(row.begin(), row.end(), logits.data() + r * stride);
      separate.push_back(row);
      seeds[r] = -r * 0x1234567890AB;
      positions[r] = 1000 * r;
    }
    const auto temperatures = column(&Settings::temperature);
    const auto top_k = column(&Settings::top_k);
    const auto top_p = column(&Settings::top_p);
    const auto min_p = column(&Settings::min_p);
    const auto check = [&](int64_t num_slots, ParallelFor parallel_for) {
      ExactArray<int64_t> ids(rows, -1);
      ExactArray<float> values(rows, kInfinity);
      ExactArray<char> scratch(num_slots * cpu::sample_scratch_bytes(count));
      const SampleParams params{logits.data(),
                                seeds.data(),
                                positions.data(),
                                temperatures.data(),
                                top_k.data(),
                                top_p.data(),
                                min_p.data(),
                                ids.data(),
                                values.data(),
                                DType::kFloat32,
                                rows,
                                count,
                                stride};
      cpu::sample(params, scratch.data(), num_slots, parallel_for);
      for (int64_t r = 0; r < rows; ++r) {
        const auto& row = separate[static_cast<size_t>(r)];
        const SampleRule rule = make_sample_rule(temperatures[r], top_k[r], top_p[r], min_p[r]);
        const uint64_t bits =
            keyed_bits(static_cast<uint64_t>(seeds[r]), static_cast<uint64_t>(positions[r]));
        EXPECT_EQ(ids[r], naive_sample(row, rule, bits)) << count << " logits, settings " << r;
        EXPECT_EQ(values[r], *std::max_element(row.begin(), row.end()));
      }
    };
    check(1, kSerial);
    check(rows, kBackwards);
    check(3, kThreePoolThreads);
  }
}

TEST_F(Sample, WeightsOfVectorsAreThoseOfTheRule) {
  const float top = 3.25F;
  for (int64_t count = 1; count <= 100; ++count) {
    auto logits = random_floats(count, static_cast<uint32_t>(count), 10.0F);
    for (float& logit : logits) logit = std::min(logit, top);
    logits[0] = -kInfinity;
    ExactArray<float> given(logits), weights(count, -1.0F);
    cpu::kernels().sample_weights(given.data(), count, top, 1.25F, weights.data());
    for (int64_t i = 0; i < count; ++i) {
      const float expected = sample_weight(Rounded{given[i]}, Rounded{top}, Rounded{1.25F}).v;
      EXPECT_EQ(weights[i], expected);
    }
  }
}

TEST(SampleRule, WeightsAreIntegersNearTheExponential) {
  EXPECT_EQ(weight_of(7.5F, 7.5F, 3.0F), kLargestWeight);
  EXPECT_EQ(weight_of(-kInfinity, 7.5F, 3.0F), 0u);
  EXPECT_EQ(weight_of(kLowestExponent, 0.0F, 1.0F), 0u);
  double lowest_before = 2 * static_cast<double>(kLargestWeight);
  for (float x = 0.0F; x > -25.0F; x = x * 1.0001F - 1e-6F) {
    const double weight = static_cast<double>(weight_of(x, 0.0F, 1.0F));
    EXPECT_NEAR(weight, std::exp(static_cast<double>(x)) * 0x1p32, 1.0 + 1e-6 * weight);
    // Not lower by more than a rounding: what top-p leaves aside relies on it.
    EXPECT_LE(weight, lowest_before * (1 + 1e-6) + 1);
    lowest_before = weight;
  }
}

TEST(SampleRule, KeysOrderFloats) {
  const std::vector<float> ascending = {-kInfinity, -1e30F, -1.0F, -1e-45F, 0.0F,
                                        1e-45F,     1e-30F, 1.0F,  1e30F,   kInfinity};
  for (size_t i = 0; i < ascending.size(); ++i) {
    EXPECT_EQ(value_of_key(order_key(ascending[i])), ascending[i]);
  }
  for (size_t i = 1; i < ascending.size(); ++i) {
    EXPECT_LT(order_key(ascending[i - 1]), order_key(ascending[i]));
  }
  EXPECT_EQ(order_key(-0.0F), order_key(0.0F));
}

// The numbers of numpy.random.Philox(key=[seed, position]).random_raw().
TEST(SampleRule, RandomBitsAreThoseOfNumpy) {
  EXPECT_EQ(keyed_bits(0, 0), 0x2F4BA6408E4D89Bu);
  EXPECT_EQ(keyed_bits(1, 2), 0x4F2F4313B5536B09u);
  EXPECT_EQ(keyed_bits(~uint64_t{0}, 7), 0x132B66D32865281Eu);
}

}  // namespace
}  // namespace skv
