// paged_attention against double, and one row alone against the same row in a batch.
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <string>

#include "csrc/kernels/cpu/half.h"
#include "tests/cpp/kernel_testing.h"

namespace skv {
namespace {

using PagedAttention = KernelTest;

struct Sequence {
  int64_t length;   // keys, with those of the new rows
  int64_t num_new;  // query rows
};

struct Case {
  std::string name;
  std::vector<Sequence> sequences;
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t head_dim;
  int64_t page_size;
  int64_t window = 0;
  float soft_cap = 0.0F;
};

// All arguments of one call, in arrays of exact size. What must never be read holds NaN (slots) or
// an impossible page (table).
template <typename Element>
class Batch {
 public:
  Batch(const Case& c, DType dtype)
      : case_(c),
        dtype_(dtype),
        max_pages_(longest() / c.page_size + 2),
        row_stride_(c.num_heads * c.head_dim + 3),
        layout_{num_pages_in_use(), c.num_kv_heads, c.page_size, c.head_dim},
        query_(random_floats(
            std::max<int64_t>(0, (num_rows() - 1) * row_stride_ + c.num_heads * c.head_dim), 1)),
        page_table_(num_sequences() * max_pages_, std::numeric_limits<int32_t>::min()),
        seq_lens_(num_sequences()),
        offsets_(num_sequences() + 1),
        k_pool_(layout_.num_pages * layout_.page_elements(), nan()),
        v_pool_(layout_.num_pages * layout_.page_elements(), nan()),
        k_scales_(kIsInt8 ? layout_.num_pages * layout_.page_vectors() : 0, std::nanf("")),
        v_scales_(kIsInt8 ? layout_.num_pages * layout_.page_vectors() : 0, std::nanf("")) {
    std::vector<int32_t> pages(static_cast<size_t>(layout_.num_pages));
    std::iota(pages.begin(), pages.end(), 0);
    std::shuffle(pages.begin(), pages.end(), std::mt19937(2));
    size_t next_page = 0;
    for (int64_t s = 0; s < num_sequences(); ++s) {
      const Sequence& sequence = c.sequences[static_cast<size_t>(s)];
      seq_lens_[s] = static_cast<int32_t>(sequence.length);
      offsets_[s + 1] = offsets_[s] + static_cast<int32_t>(sequence.num_new);
      for (int64_t i = 0; i < pages_of(sequence); ++i) {
        page_table_[s * max_pages_ + i] = pages[next_page++];
      }
      fill_slots(s, sequence.length);
    }
  }

  ExactArray<float> run(ParallelFor parallel_for) const {
    return call(query_.data(), num_rows(), page_table_, seq_lens_, offsets_, parallel_for);
  }

  // The row as the only one of its call: the keys behind it do not exist yet.
  ExactArray<float> run_alone(int64_t sequence, int64_t row) const {
    const int64_t length = position(sequence, row) + 1;
    const int32_t* pages = page_table_.data() + sequence * max_pages_;
    const ExactArray<int32_t> page_table(
        std::vector<int32_t>(pages, pages + (length - 1) / case_.page_size + 1));
    return call(query_.data() + row * row_stride_, 1, page_table,
                ExactArray<int32_t>(1, static_cast<int32_t>(length)),
                ExactArray<int32_t>(std::vector<int32_t>{0, 1}), kSerial);
  }

  std::vector<double> in_double(int64_t sequence, int64_t row, int64_t head) const {
    const int64_t kv_head = head / (case_.num_heads / case_.num_kv_heads);
    const float* query = query_.data() + row * row_stride_ + head * case_.head_dim;
    const int64_t last = position(sequence, row);
    const int64_t first = case_.window > 0 ? std::max<int64_t>(0, last + 1 - case_.window) : 0;
    std::vector<double> scores;
    for (int64_t key = first; key <= last; ++key) {
      const int64_t at = vector_offset(sequence, key, kv_head);
      const Element* vector = k_pool_.data() + at;
      double score = 0;
      for (int64_t d = 0; d < case_.head_dim; ++d) score += query[d] * number(vector[d]);
      score *= scale() * factor(k_scales_, at);
      if (case_.soft_cap > 0) score = case_.soft_cap * std::tanh(score / case_.soft_cap);
      scores.push_back(score);
    }
    const double largest = *std::max_element(scores.begin(), scores.end());
    double sum = 0;
    std::vector<double> output(static_cast<size_t>(case_.head_dim), 0.0);
    for (int64_t key = first; key <= last; ++key) {
      const double weight = std::exp(scores[static_cast<size_t>(key - first)] - largest);
      const int64_t at = vector_offset(sequence, key, kv_head);
      const Element* vector = v_pool_.data() + at;
      sum += weight;
      for (size_t d = 0; d < output.size(); ++d) {
        output[d] += weight * number(vector[d]) * factor(v_scales_, at);
      }
    }
    for (double& value : output) value /= sum;
    return output;
  }

  const ExactArray<int32_t>& offsets() const { return offsets_; }
  int64_t num_sequences() const { return static_cast<int64_t>(case_.sequences.size()); }
  int64_t row_size() const { return case_.num_heads * case_.head_dim; }

 private:
  static constexpr bool kIsInt8 = sizeof(Element) == 1;

  static Element nan() {
    if constexpr (sizeof(Element) == 4) {
      return std::nanf("");
    } else if constexpr (kIsInt8) {
      return 99;  // int8 has none: the scales are NaN
    } else {
      return 0x7FFF;  // in both 16-bit types
    }
  }
  Element rounded(float value, float scale) const {
    if constexpr (sizeof(Element) == 4) {
      return value;
    } else if constexpr (kIsInt8) {
      return static_cast<Element>(std::clamp(std::round(value / scale), -127.0F, 127.0F));
    } else {
      return dtype_ == DType::kFloat16 ? cpu::float_to_half(value) : cpu::float_to_bfloat16(value);
    }
  }
  float number(Element value) const {
    if constexpr (sizeof(Element) == 4 || kIsInt8) {
      return value;
    } else {
      return dtype_ == DType::kFloat16 ? cpu::half_to_float(value) : cpu::bfloat16_to_float(value);
    }
  }
  double factor(const ExactArray<float>& scales, int64_t vector_at) const {
    return kIsInt8 ? scales[vector_at / case_.head_dim] : 1.0F;
  }

  int64_t pages_of(const Sequence& sequence) const {
    return (sequence.length + case_.page_size - 1) / case_.page_size;
  }
  int64_t num_pages_in_use() const {
    int64_t count = 0;
    for (const Sequence& sequence : case_.sequences) count += pages_of(sequence);
    return count;
  }
  int64_t longest() const {
    int64_t length = 0;
    for (const Sequence& sequence : case_.sequences) length = std::max(length, sequence.length);
    return length;
  }
  int64_t num_rows() const {
    int64_t count = 0;
    for (const Sequence& sequence : case_.sequences) count += sequence.num_new;
    return count;
  }
  int64_t position(int64_t sequence, int64_t row) const {
    return seq_lens_[sequence] - (offsets_[sequence + 1] - row);
  }
  int64_t vector_offset(int64_t sequence, int64_t key, int64_t kv_head) const {
    const int32_t page = page_table_[sequence * max_pages_ + key / case_.page_size];
    return layout_.vector_offset(page, kv_head, key % case_.page_size);
  }
  float scale() const { return 1.0F / std::sqrt(static_cast<float>(case_.head_dim)); }

  void fill_slots(int64_t sequence, int64_t length) {
    const int64_t width = case_.num_kv_heads * case_.head_dim;
    const auto seed = static_cast<uint32_t>(10 + 2 * sequence);
    const auto keys = random_floats(length * width, seed, 2.0F);
    const auto values = random_floats(length * width, seed + 1);
    for (int64_t i = 0; i < length * width; ++i) {
      const int64_t at = vector_offset(sequence, i / width, i % width / case_.head_dim);
      const float key_scale = 0.05F * static_cast<float>(1 + i / case_.head_dim % 3);
      const float value_scale = 0.02F * static_cast<float>(1 + i / case_.head_dim % 5);
      k_pool_[at + i % case_.head_dim] = rounded(keys[static_cast<size_t>(i)], key_scale);
      v_pool_[at + i % case_.head_dim] = rounded(values[static_cast<size_t>(i)], value_scale);
      if (!kIsInt8) continue;
      k_scales_[at / case_.head_dim] = key_scale;
      v_scales_[at / case_.head_dim] = value_scale;
    }
  }

  ExactArray<float> call(const float* query, int64_t rows, const ExactArray<int32_t>& page_table,
                         const ExactArray<int32_t>& seq_lens, const ExactArray<int32_t>& offsets,
                         ParallelFor parallel_for) const {
    ExactArray<float> output(rows * row_size(), std::nanf(""));
    cpu::kernels().paged_attention({.query = query,
                                    .k_pool = k_pool_.data(),
                                    .v_pool = v_pool_.data(),
                                    .k_scales = kIsInt8 ? k_scales_.data() : nullptr,
                                    .v_scales = kIsInt8 ? v_scales_.data() : nullptr,
                                    .page_table = page_table.data(),
                                    .seq_lens = seq_lens.data(),
                                    .query_offsets = offsets.data(),
                                    .output = output.data(),
                                    .layout = layout_,
                                    .activation_dtype = DType::kFloat32,
                                    .kv_dtype = dtype_,
                                    .num_sequences = seq_lens.size(),
                                    .num_rows = rows,
                                    .num_heads = case_.num_heads,
                                    .max_pages = max_pages_,
                                    .query_row_stride = row_stride_,
                                    .query_head_stride = case_.head_dim,
                                    .page_table_row_stride = max_pages_,
                                    .scale = scale(),
                                    .sliding_window = case_.window,
                                    .soft_cap = case_.soft_cap},
                                   parallel_for);
    return output;
  }

  const Case& case_;
  DType dtype_;
  int64_t max_pages_;
  int64_t row_stride_;
  KvLayout layout_;
  ExactArray<float> query_;
  ExactArray<int32_t> page_table_;
  ExactArray<int32_t> seq_lens_;
  ExactArray<int32_t> offsets_;
  ExactArray<Element> k_pool_;
  ExactArray<Element> v_pool_;
  ExactArray<float> k_scales_;
  ExactArray<float> v_scales_;
};

bool same_bits(const float* a, const float* b, int64_t count) {
  return std::memcmp(a, b, static_cast<size_t>(count) * sizeof(float)) == 0;
}

template <typename Element>
void check(const Case& c, DType dtype) {
  const std::string text = c.name + ", dtype " + std::to_string(static_cast<int>(dtype));
  const Batch<Element> batch(c, dtype);
  const int64_t row_size = batch.row_size();
  const auto together = batch.run(kSerial);
  for (const ParallelFor parallel_for : {ParallelFor(kBackwards), ParallelFor(kThreePoolThreads)}) {
    const auto cut = batch.run(parallel_for);
    EXPECT_TRUE(same_bits(cut.data(), together.data(), cut.size())) << text;
  }
  for (int64_t s = 0; s < batch.num_sequences(); ++s) {
    const int64_t begin = batch.offsets()[s];
    const int64_t end = batch.offsets()[s + 1];
    // All rows of a long extend would take long and show the same.
    for (int64_t row = begin; row < end; row += end - begin > 8 ? 7 : 1) {
      const auto alone = batch.run_alone(s, row);
      EXPECT_TRUE(same_bits(alone.data(), together.data() + row * row_size, row_size))
          << text << ", row " << row;
      for (int64_t head = 0; head < c.num_heads; ++head) {
        const auto wanted = batch.in_double(s, row, head);
        for (int64_t d = 0; d < c.head_dim; ++d) {
          ASSERT_NEAR(together[row * row_size + head * c.head_dim + d],
                      wanted[static_cast<size_t>(d)], 2e-5)
              << text << " at [" << row << ", " << head << ", " << d << "]";
        }
      }
    }
  }
}

void check_dtypes(const Case& c) {
  check<float>(c, DType::kFloat32);
  check<uint16_t>(c, DType::kFloat16);
  check<uint16_t>(c, DType::kBFloat16);
  check<int8_t>(c, DType::kInt8);
}

TEST_F(PagedAttention, OneQueryVector) {
  check_dtypes({"one key", {{1, 1}}, 1, 1, 32, 16});
  check_dtypes({"partial page", {{37, 1}}, 1, 1, 64, 16});
  check_dtypes({"full page", {{48, 1}}, 1, 1, 96, 16});
  check_dtypes({"largest head", {{70, 1}}, 1, 1, 256, 64});
}

TEST_F(PagedAttention, MoreQueryVectorsThanATileTakes) {
  check_dtypes({"49 rows", {{60, 49}}, 2, 2, 32, 16});
  check_dtypes({"groups of three", {{80, 35}}, 6, 2, 64, 16});
  check_dtypes({"a whole prompt", {{300, 300}}, 1, 1, 16, 32});
}

TEST_F(PagedAttention, ManyKeysAreSplit) {
  check_dtypes({"one tile", {{1100, 1}}, 3, 1, 64, 64});
  check_dtypes({"several tiles", {{530, 2}, {0, 0}, {1025, 20}}, 6, 2, 96, 16});
  check_dtypes({"with window", {{1300, 3}}, 2, 1, 32, 64, 600});
}

TEST_F(PagedAttention, ManyTilesAreNot) {
  check_dtypes({"ragged",
                {{600, 1}, {1, 1}, {0, 0}, {17, 5}, {40, 0}, {16, 16}, {5, 2}, {33, 1}, {64, 4}},
                6,
                3,
                32,
                16});
}

TEST_F(PagedAttention, SlidingWindow) {
  check_dtypes({"of one", {{40, 3}}, 2, 1, 32, 16, 1});
  check_dtypes({"shorter than a chunk", {{400, 60}, {3, 3}}, 2, 2, 64, 16, 100});
  check_dtypes({"longer than the text", {{90, 20}}, 1, 1, 64, 64, 1000});
}

TEST_F(PagedAttention, SoftCap) {
  check_dtypes({"soft cap", {{300, 5}, {20, 20}}, 4, 2, 64, 16, 0, 3.0F});
  check_dtypes({"soft cap, split, window", {{900, 2}}, 2, 1, 256, 32, 700, 3.0F});
}

TEST_F(PagedAttention, NothingToDo) {
  check_dtypes({"no sequence", {}, 2, 1, 32, 16});
  check_dtypes({"empty sequences", {{0, 0}, {5, 0}, {0, 0}}, 2, 1, 32, 16});
}

}  // namespace
}  // namespace skv
