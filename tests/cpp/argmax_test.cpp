// argmax against a scalar loop.
#include <cmath>
#include <limits>

#include "tests/cpp/kernel_testing.h"

namespace skv {
namespace {

using Argmax = KernelTest;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
const float kNan = std::nanf("");

int64_t naive_argmax(const float* row, int64_t count) {
  int64_t best = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (std::isnan(row[i])) return i;
    if (row[i] > row[best]) best = i;
  }
  return best;
}

// Rows that differ in what is hard about them; some have a tie, NaN or infinities.
std::vector<float> hard_row(int64_t count, int64_t kind) {
  auto row = random_floats(count, static_cast<uint32_t>(17 * count + kind));
  const auto at = [&](int64_t i) -> float& { return row[static_cast<size_t>(i)]; };
  if (kind == 1) at(count - 1) = 100.0F;
  if (kind == 2) at(count / 2) = at(count - 1) = 100.0F;
  if (kind == 3) at(count / 3) = at(count - 1) = kNan;
  if (kind == 4) std::fill(row.begin(), row.end(), -kInfinity);
  if (kind == 5) at(count / 2) = kInfinity, at(0) = -kInfinity;
  if (kind == 6) at(0) = kNan, at(count - 1) = kInfinity;
  return row;
}
constexpr int64_t kNumKinds = 7;

TEST_F(Argmax, FindsTheFirstLargestAlsoInStridedRows) {
  for (int64_t count : {1, 2, 15, 16, 31, 63, 64, 65, 129, 1000, 20000}) {
    const int64_t stride = count + 5;
    ExactArray<float> logits((kNumKinds - 1) * stride + count, kInfinity);
    for (int64_t kind = 0; kind < kNumKinds; ++kind) {
      const auto row = hard_row(count, kind);
      std::copy(row.begin(), row.end(), logits.data() + kind * stride);
    }
    const auto check = [&](ParallelFor parallel_for) {
      ExactArray<int64_t> ids(kNumKinds, -1);
      ExactArray<float> values(kNumKinds, -1.0F);
      cpu::kernels().argmax(
          {logits.data(), ids.data(), values.data(), DType::kFloat32, kNumKinds, count, stride},
          parallel_for);
      for (int64_t kind = 0; kind < kNumKinds; ++kind) {
        const float* row = logits.data() + kind * stride;
        EXPECT_EQ(ids[kind], naive_argmax(row, count)) << count << " values, kind " << kind;
        const float wanted = row[naive_argmax(row, count)];
        EXPECT_TRUE(values[kind] == wanted || (std::isnan(values[kind]) && std::isnan(wanted)));
      }
    };
    check(kSerial);
    check(kBackwards);
    check(kThreePoolThreads);
  }
}

TEST_F(Argmax, SeesTheLastValueAndNoneBehindIt) {
  for (int64_t count = 1; count <= 200; ++count) {
    ExactArray<float> logits(count, -kInfinity);
    logits[count - 1] = -1.0F;
    int64_t id = -1;
    float value = 0.0F;
    cpu::kernels().argmax({logits.data(), &id, &value, DType::kFloat32, 1, count, count}, kSerial);
    EXPECT_EQ(id, count - 1);
    EXPECT_EQ(value, -1.0F);
  }
}

}  // namespace
}  // namespace skv
