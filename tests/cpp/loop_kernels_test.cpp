// The kernels around a step whose state is in device memory, on hand-made sequences; memory behind
// every array is the sanitizers' to watch.
#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <vector>

#include "csrc/kernels/cpu/advance_sequences.h"
#include "csrc/kernels/cpu/fill_rows.h"

namespace skv {
namespace {

using Ints = std::vector<int32_t>;
using Longs = std::vector<int64_t>;

TEST(FillRows, PacksTheRowsAndPadsTheRest) {
  // With a draft over the end of a page; without room for a second token; finished; without room.
  const Ints history{1, 2, 3, 0, 4, 5, 0, 0, 6, 7, 0, 0, 8, 9, 0, 0};
  const Ints lengths{3, 2, 2, 2}, num_left{5, 9, 0, 3}, kv_limits{8, 2, 8, 1};
  const Ints draft_ids{10, 11, 12, 13, 14, 15, 16, 17}, num_draft{2, 2, 1, 1};
  const Ints page_table{3, 1, 0, 7, 5, 2, 4, 9, 9, 6, 9, 9, 8, 9, 9, 9};
  Longs tokens(12, 77), slots(12, 77), sequences(12, 77);
  Ints positions(12, 77), seq_lens(4, 77), offsets(5, 77);
  cpu::fill_rows({history.data(), lengths.data(), num_left.data(), kv_limits.data(),
                  draft_ids.data(), num_draft.data(), page_table.data(), tokens.data(),
                  positions.data(), slots.data(), seq_lens.data(), offsets.data(), sequences.data(),
                  4, 4, 2, 4, 2});
  EXPECT_EQ(offsets, (Ints{0, 3, 4, 4, 4}));
  EXPECT_EQ(tokens, (Longs{3, 10, 11, 5, 0, 0, 0, 0, 0, 0, 0, 0}));
  EXPECT_EQ(positions, (Ints{2, 3, 4, 1, 0, 0, 0, 0, 0, 0, 0, 0}));
  EXPECT_EQ(slots, (Longs{2, 3, 0, 11, -1, -1, -1, -1, -1, -1, -1, -1}));
  EXPECT_EQ(sequences, (Longs{0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0}));
  EXPECT_EQ(seq_lens, (Ints{5, 2, 0, 0}));
}

TEST(FillRows, WritesNoMoreRowsThanThereAre) {
  // Differences that are no int32, and drafts longer than any: at most K + 1 rows a sequence.
  constexpr int32_t kLow = std::numeric_limits<int32_t>::min();
  constexpr int32_t kHigh = std::numeric_limits<int32_t>::max();
  const Ints history{1, 2, 3, 4, 5, 6, 7, 8}, lengths{2, 1, 2, 1}, num_left{kHigh, kHigh, 3, kLow};
  const Ints kv_limits{kLow, kHigh, kHigh, kHigh}, num_draft{30000, kHigh, kLow, 1};
  const Ints draft_ids{10, 11, 12, 13}, page_table{0, 1, 2, 3};
  Longs tokens(8, 77), slots(8, 77), sequences(8, 77);
  Ints positions(8, 77), seq_lens(4, 77), offsets(5, 77);
  cpu::fill_rows({history.data(), lengths.data(), num_left.data(), kv_limits.data(),
                  draft_ids.data(), num_draft.data(), page_table.data(), tokens.data(),
                  positions.data(), slots.data(), seq_lens.data(), offsets.data(), sequences.data(),
                  4, 2, 1, 1, 4});
  EXPECT_EQ(offsets, (Ints{0, 0, 2, 3, 3}));
  EXPECT_EQ(tokens, (Longs{3, 11, 6, 0, 0, 0, 0, 0}));
  EXPECT_EQ(slots, (Longs{4, 5, 9, -1, -1, -1, -1, -1}));
  EXPECT_EQ(seq_lens, (Ints{0, 2, 2, 0}));
}

TEST(AdvanceSequences, CountsStayAtTheLargestNumber) {
  constexpr int32_t kHigh = std::numeric_limits<int32_t>::max();
  const Longs fed{1, 2, 3}, targets{2, 3, 4};
  const std::vector<float> values(3, 0.5f);
  const Ints offsets{0, 3}, stops{};
  Ints history(8, 0), lengths{1}, num_left{kHigh}, counts{kHigh, kHigh - 1, kHigh - 1};
  cpu::advance_sequences({fed.data(), targets.data(), values.data(), offsets.data(), stops.data(),
                          history.data(), lengths.data(), num_left.data(), counts.data(), 1, 8, 0});
  EXPECT_EQ(counts, (Ints{kHigh, kHigh, kHigh}));
  EXPECT_EQ(num_left, (Ints{kHigh - 3}));
}

TEST(AdvanceSequences, EndsEachRunWhereItEnds) {
  // All agree; refused at once; a stop token; the last token; no rows; a bad value; padding.
  const Longs fed{1, 2, 3, 1, 2, 1, 2, 3, 1, 2, 3, 1, 2, 0};
  const Longs targets{2, 3, 4, 5, 9, 2, 3, 4, 2, 3, 4, 2, 3, 0};
  std::vector<float> values(14, 0.5f);
  values[12] = std::numeric_limits<float>::quiet_NaN();
  const Ints offsets{0, 3, 5, 8, 11, 11, 13}, stops{7, 8, 7, 8, 3, -1, 7, 8, 7, 8, 7, 8};
  Ints history(6 * 4, 0), lengths{1, 1, 1, 1, 2, 1}, num_left{9, 9, 9, 2, 0, 9}, counts(18, 10);
  cpu::advance_sequences({fed.data(), targets.data(), values.data(), offsets.data(), stops.data(),
                          history.data(), lengths.data(), num_left.data(), counts.data(), 6, 4, 2});
  EXPECT_EQ(history,
            (Ints{0, 2, 3, 4, 0, 5, 0, 0, 0, 2, 3, 0, 0, 2, 3, 0, 0, 0, 0, 0, 0, 2, 0, 0}));
  EXPECT_EQ(lengths, (Ints{4, 2, 3, 3, 2, 2}));
  EXPECT_EQ(num_left, (Ints{6, 8, 0, 0, 0, kStoppedByBadLogits}));
  EXPECT_EQ(counts, (Ints{11, 12, 12, 11, 11, 10, 11, 12, 12, 11, 12, 12, 10, 10, 10, 11, 11, 11}));
}

}  // namespace
}  // namespace skv
