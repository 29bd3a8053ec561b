// What the kernel tests share. They run on the instruction set of STATEFUL_KV_CPU_ISA (the best one
// if it is not set); one that this CPU lacks is reported as skipped.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <random>
#include <vector>

#include "csrc/core/parallel_for.h"
#include "csrc/core/thread_pool.h"
#include "csrc/kernels/cpu/kernel_table.h"
#include "csrc/kernels/cpu/select_isa.h"

namespace skv {

class KernelTest : public testing::Test {
 protected:
  void SetUp() override {
    if (!cpu::isa_error().empty()) GTEST_SKIP() << cpu::isa_error();
  }
};

inline constexpr auto kSerial = [](int64_t n, int64_t grain, RangeBody body) {
  serial_parallel_for(n, grain, body);
};
// Every item a range of its own, last first: no result may depend on the cut or the order.
inline constexpr auto kBackwards = [](int64_t n, int64_t /*grain*/, RangeBody body) {
  for (int64_t i = n - 1; i >= 0; --i) body(i, i + 1);
};
// Three threads of a real pool, however small the work is.
inline constexpr auto kThreePoolThreads = [](int64_t n, int64_t /*grain*/, RangeBody body) {
  ThreadPool::instance().run(n, 1, 3, body);
};

inline std::vector<float> random_floats(int64_t count, uint32_t seed, float spread = 1.0F) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(0.0F, spread);
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = normal(generator);
  return values;
}

// An array on the heap of exactly the size asked for, so that AddressSanitizer sees an access one
// past its end. (A vector may have capacity to spare.)
template <typename T>
class ExactArray {
 public:
  explicit ExactArray(int64_t size, T value = T{})
      : size_(size), data_(new T[static_cast<size_t>(size)]) {
    std::fill_n(data_.get(), size, value);
  }
  template <typename From>
  explicit ExactArray(const std::vector<From>& values)
      : ExactArray(static_cast<int64_t>(values.size())) {
    std::copy(values.begin(), values.end(), data_.get());
  }

  T* data() { return data_.get(); }
  const T* data() const { return data_.get(); }
  int64_t size() const { return size_; }
  T& operator[](int64_t i) { return data_[static_cast<size_t>(i)]; }
  const T& operator[](int64_t i) const { return data_[static_cast<size_t>(i)]; }

 private:
  int64_t size_;
  std::unique_ptr<T[]> data_;
};

}  // namespace skv
