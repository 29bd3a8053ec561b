#include "csrc/core/propose_drafts.h"

#include <gtest/gtest.h>

#include <limits>
#include <random>
#include <stdexcept>
#include <vector>

namespace skv {
namespace {

using Tokens = std::vector<TokenId>;
using Limits = std::vector<int64_t>;

TEST(ProposeDrafts, EqualsSingleCalls) {
  std::mt19937 random(5);
  std::vector<NgramIndex> indexes(5), singles(5);
  std::vector<NgramIndex*> pointers;
  for (NgramIndex& index : indexes) pointers.push_back(&index);
  for (int round = 0; round < 200; ++round) {
    std::vector<Tokens> added(indexes.size());
    std::vector<TokenSpan> tokens;
    Limits limits;
    for (Tokens& text : added) {
      const auto count = random() % 8;
      for (size_t i = 0; i < count; ++i) text.push_back(static_cast<TokenId>(random() % 3));
      tokens.emplace_back(std::span<const TokenId>(text));
      limits.push_back(random() % 5);
    }
    const DraftBatch batch = propose_drafts(pointers, tokens, limits);
    Tokens expected;
    for (size_t i = 0; i < singles.size(); ++i) {
      singles[i].append(tokens[i]);
      const Draft draft = limits[i] > 0 ? singles[i].propose(limits[i]) : Draft{};
      expected.insert(expected.end(), draft.tokens.begin(), draft.tokens.end());
      EXPECT_EQ(batch.lens[i], static_cast<int32_t>(draft.tokens.size()));
      EXPECT_EQ(batch.match_lens[i], draft.match_len);
      EXPECT_EQ(indexes[i].size(), singles[i].size()) << "appended also where nothing is drafted";
    }
    EXPECT_EQ(batch.tokens, expected);
  }
  for (const NgramIndex& index : indexes) EXPECT_EQ(index.check_integrity(), std::nullopt);
}

TEST(ProposeDrafts, AnEmptyBatch) {
  const DraftBatch batch = propose_drafts({}, {}, {});
  EXPECT_TRUE(batch.tokens.empty() && batch.lens.empty() && batch.match_lens.empty());
}

TEST(ProposeDrafts, BadArgumentsThrowBeforeAnythingIsAppended) {
  NgramIndex first, second;
  const std::vector<NgramIndex*> both{&first, &second};
  const Tokens good{1, 2, 3};
  const std::vector<int64_t> wide{1, int64_t{1} << 31};
  const std::vector<TokenSpan> tokens{std::span<const TokenId>(good),
                                      std::span<const TokenId>(good)};
  const std::vector<TokenSpan> bad_last{std::span<const TokenId>(good),
                                        std::span<const int64_t>(wide)};
  const std::vector<NgramIndex*> twice{&first, &first};
  EXPECT_THROW(propose_drafts(twice, tokens, Limits{1, 1}), std::invalid_argument);
  EXPECT_THROW(propose_drafts(both, bad_last, Limits{1, 1}), std::invalid_argument);
  EXPECT_THROW(propose_drafts(both, tokens, Limits{1, -1}), std::invalid_argument);
  EXPECT_THROW(propose_drafts(both, tokens, Limits{1}), std::invalid_argument);
  EXPECT_THROW(propose_drafts(both, {}, Limits{1, 1}), std::invalid_argument);
  EXPECT_EQ(first.size(), 0);
  EXPECT_EQ(second.size(), 0);
}

TEST(ProposeDrafts, APeriodicDraftIsBounded) {
  NgramIndex index;
  const Tokens text(8, 1);
  NgramIndex* const pointer = &index;
  const TokenSpan span{std::span<const TokenId>(text)};
  const int64_t limit = std::numeric_limits<int64_t>::max();
  const DraftBatch batch = propose_drafts({&pointer, 1}, {&span, 1}, {&limit, 1});
  EXPECT_EQ(batch.lens, (std::vector<int32_t>{NgramIndex::kMaxDraft}));
}

}  // namespace
}  // namespace skv
