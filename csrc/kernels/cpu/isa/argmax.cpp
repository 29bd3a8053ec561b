// The largest value of each row and its lowest index. NaN wins over everything, as in torch.
#include <cmath>
#include <limits>

#include "csrc/kernels/cpu/isa/elements.h"
#include "csrc/kernels/cpu/isa/kernels.h"

namespace skv::cpu::SKV_ISA_NS {
namespace {

constexpr int64_t kValuesPerThread = 1 << 14;
constexpr int kChains = 4;  // independent maxima, so that one need not wait for the other

// The maximum if the row has no NaN; else NaN. max(a, b) returns b if either is NaN, so a NaN
// that is followed by a number would be lost: a sum of x - x is NaN exactly if some x is NaN or
// infinite, and only then the row is looked at again one by one.
template <typename Load>
float largest_value(const typename Load::Element* row, int64_t count) {
  float largest = -std::numeric_limits<float>::infinity();
  int64_t i = 0;
  if (count >= kChains * Vec::kWidth) {
    Vec top[kChains];
    Vec sum[kChains];
    for (int c = 0; c < kChains; ++c) {
      top[c] = Vec::set1(largest);
      sum[c] = Vec::zero();
    }
    for (; i + kChains * Vec::kWidth <= count; i += kChains * Vec::kWidth) {
      for (int c = 0; c < kChains; ++c) {
        const Vec x = Load::load(row + i + c * Vec::kWidth);
        top[c] = max(x, top[c]);
        sum[c] = sum[c] + (x - x);
      }
    }
    largest = reduce_max(max(max(top[0], top[1]), max(top[2], top[3])));
    if (std::isnan(reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3])))) {
      i = 0;
      largest = -std::numeric_limits<float>::infinity();
    }
  }
  for (; i < count; ++i) {
    const float x = Load::load_one(row + i);
    if (std::isnan(x)) return x;
    largest = x > largest ? x : largest;
  }
  return largest;
}

template <typename Load>
int64_t first_index(const typename Load::Element* row, int64_t count, float value) {
  if (std::isnan(value)) {  // apart, so that the usual search compares once an element
    for (int64_t i = 0; i < count; ++i) {
      if (std::isnan(Load::load_one(row + i))) return i;
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    if (Load::load_one(row + i) == value) return i;
  }
  return 0;  // not reached: the value is in the row
}

}  // namespace

void argmax(const ArgmaxParams& params, ParallelFor parallel_for) {
  const int64_t grain = 1 + kValuesPerThread / params.vocab_size;
  parallel_for(params.num_rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const Row row = Row{params.logits, params.logits_dtype}.from(r * params.row_stride);
      row.dispatch([&]<typename Load>(const typename Load::Element* logits) {
        params.values[r] = largest_value<Load>(logits, params.vocab_size);
        params.ids[r] = first_index<Load>(logits, params.vocab_size, params.values[r]);
      });
    }
  });
}

}  // namespace skv::cpu::SKV_ISA_NS
