#include "csrc/kernels/cpu/sample.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>

#include "csrc/kernels/cpu/select_isa.h"
#include "csrc/kernels/sample_rule.h"

// Most of a vocabulary cannot be drawn. The maxima of blocks of the row, which finding its largest
// logit gives in passing, tell which blocks hold candidates; only these are looked at again.

namespace skv::cpu {

namespace {

int64_t num_blocks(int64_t vocab_size) { return (vocab_size + kSampleBlock - 1) / kSampleBlock; }

// Tokens that may still be drawn, ids ascending.
struct Candidates {
  float* logits;
  float* weights;
  int32_t* ids;
  int64_t count = 0;

  // Keeps those for which is_kept(index) holds; called once for each, in order.
  template <typename IsKept>
  void keep(IsKept is_kept) {
    int64_t kept = 0;
    for (int64_t i = 0; i < count; ++i) {
      const bool stays = is_kept(i);
      logits[kept] = logits[i];
      weights[kept] = weights[i];
      ids[kept] = ids[i];
      kept += stays ? 1 : 0;
    }
    count = kept;
  }
};

// The memory of one row, cut from the caller's scratch.
struct RowScratch {
  float* row;      // [V], of 16-bit logits
  float* maxima;   // [blocks]
  float* ordered;  // [blocks]
  Candidates candidates;

  RowScratch(void* memory, int64_t vocab_size)
      : row(static_cast<float*>(memory)),
        maxima(row + vocab_size),
        ordered(maxima + num_blocks(vocab_size)),
        candidates{
            .logits = ordered + num_blocks(vocab_size),
            .weights = ordered + num_blocks(vocab_size) + vocab_size,
            .ids = reinterpret_cast<int32_t*>(ordered + num_blocks(vocab_size) + 2 * vocab_size)} {}
};

// A logit below which no token can be drawn, whatever top-k and top-p do: its weight is 0, or less
// than min-p asks for. The margin is a thousand times the error of a weight.
double reachable_bound(const SampleRule& rule, float top) {
  double exponent = kLowestExponent;
  // Top-p takes its share of all weights, so min-p may not drop any before it.
  if (rule.top_p >= 1.0F && rule.min_weight > 1) {
    exponent = std::max(exponent, std::log(static_cast<double>(rule.min_weight) * 0x1p-32));
  }
  const double bound = top + (exponent - 1e-3) / static_cast<double>(rule.inverse_temperature);
  return std::max(bound, static_cast<double>(std::numeric_limits<float>::lowest()));
}

// At least k logits are as large as this: so many blocks have a maximum that is.
double top_k_bound(const RowScratch& scratch, int64_t blocks, int64_t k) {
  if (k > blocks) return std::numeric_limits<float>::lowest();
  std::copy_n(scratch.maxima, blocks, scratch.ordered);
  std::nth_element(scratch.ordered, scratch.ordered + k - 1, scratch.ordered + blocks,
                   std::greater<>());
  return scratch.ordered[k - 1];
}

void collect(const float* row, int64_t vocab_size, double bound, RowScratch& scratch) {
  Candidates& found = scratch.candidates;
  const auto smallest = static_cast<float>(bound);  // no float lies between the two
  found.count = 0;
  for (int64_t block = 0; block * kSampleBlock < vocab_size; ++block) {
    if (!(scratch.maxima[block] >= smallest)) continue;
    const int64_t end = std::min(vocab_size, (block + 1) * kSampleBlock);
    for (int64_t i = block * kSampleBlock; i < end; ++i) {
      found.logits[found.count] = row[i];
      found.ids[found.count] = static_cast<int32_t>(i);
      found.count += row[i] >= smallest ? 1 : 0;
    }
  }
}

constexpr int kBorderBits = 8;
constexpr uint32_t kBorderParts = 1u << kBorderBits;

struct Border {
  uint32_t key;      // of the smallest logit that is kept
  uint64_t missing;  // what the larger ones lack of the target
};

// Where the amounts of candidates, largest logit first, add up to `target`, which is from 1 to the
// sum of all. Narrows an interval of keys, kBorderParts at a time.
template <typename Amount>
Border find_border(const Candidates& candidates, uint64_t target, Amount amount) {
  uint32_t low = std::numeric_limits<uint32_t>::max();
  uint32_t high = 0;
  for (int64_t i = 0; i < candidates.count; ++i) {
    const uint32_t key = order_key(candidates.logits[i]);
    low = std::min(low, key);
    high = std::max(high, key);
  }
  for (;;) {
    const uint32_t width = high - low;
    const int shift = std::max(0, static_cast<int>(std::bit_width(width)) - kBorderBits);
    uint64_t parts[kBorderParts + 1] = {};  // the last one is for keys outside: no branch to guess
    for (int64_t i = 0; i < candidates.count; ++i) {
      const uint32_t below = high - order_key(candidates.logits[i]);
      parts[below <= width ? below >> shift : kBorderParts] += amount(i);
    }
    uint32_t part = 0;
    while (parts[part] < target) target -= parts[part++];
    high -= part << shift;
    low = std::max(low, high - std::min(high, (1u << shift) - 1));
    if (shift == 0) return {high, target};
  }
}

// Keeps what lies above the border and as many at it as `missing` asks for, lowest ids first.
void cut_at(Candidates& candidates, Border border, uint64_t amount_at_border) {
  uint64_t num_equal = (border.missing + amount_at_border - 1) / amount_at_border;
  candidates.keep([&](int64_t i) {
    const uint32_t key = order_key(candidates.logits[i]);
    if (key != border.key) return key > border.key;
    const bool stays = num_equal > 0;
    num_equal -= stays ? 1 : 0;
    return stays;
  });
}

uint64_t weight_of(const Candidates& candidates, int64_t i) {
  return static_cast<uint64_t>(static_cast<int64_t>(candidates.weights[i]));
}

void apply_top_p(Candidates& candidates, const SampleRule& rule, float top) {
  uint64_t total = 0;
  for (int64_t i = 0; i < candidates.count; ++i) total += weight_of(candidates, i);
  const uint64_t target = top_p_target(rule.top_p, total);
  // Tokens of at most `light` weigh total - target together at most, so the others reach the
  // target. Those near `light` stay: a larger logit might weigh a little less there, by rounding.
  const uint64_t light = (total - target) / static_cast<uint64_t>(candidates.count);
  const uint64_t margin = light / 1024 + 2;
  if (light > margin) {
    const auto lightest = static_cast<float>(light - margin);
    candidates.keep([&](int64_t i) { return candidates.weights[i] > lightest; });
  }
  const Border border =
      find_border(candidates, target, [&](int64_t i) { return weight_of(candidates, i); });
  const Rounded weight = sample_weight(Rounded{value_of_key(border.key)}, Rounded{top},
                                       Rounded{rule.inverse_temperature});
  cut_at(candidates, border, static_cast<uint64_t>(weight.v));
}

int64_t draw(const Candidates& candidates, uint64_t min_weight, uint64_t bits) {
  const auto weight = [&](int64_t i) {
    const uint64_t value = weight_of(candidates, i);
    return value >= min_weight ? value : 0;
  };
  uint64_t total = 0;
  for (int64_t i = 0; i < candidates.count; ++i) total += weight(i);
  const uint64_t target = draw_target(bits, total);
  uint64_t sum = 0;
  int64_t i = 0;
  while ((sum += weight(i)) <= target) ++i;
  return candidates.ids[i];
}

int64_t first_of(const float* row, int64_t vocab_size, float value, const float* maxima) {
  int64_t i = 0;
  while (maxima[i / kSampleBlock] != value) i += kSampleBlock;
  while (i < vocab_size && row[i] != value) ++i;
  return i;
}

void sample_row(const SampleParams& params, int64_t r, RowScratch& scratch) {
  const int64_t vocab_size = params.vocab_size;
  const float* row = static_cast<const float*>(params.logits) + r * params.row_stride;
  if (params.logits_dtype != DType::kFloat32) {
    const auto* values = static_cast<const uint16_t*>(params.logits) + r * params.row_stride;
    kernels().widen(values, params.logits_dtype, vocab_size, scratch.row);
    row = scratch.row;
  }
  const float top = kernels().block_maxima(row, vocab_size, scratch.maxima);
  // One NaN and one zero, as on every device.
  params.values[r] = std::isnan(top) ? std::numeric_limits<float>::quiet_NaN() : top + 0.0F;
  params.ids[r] = 0;
  if (!std::isfinite(top)) return;

  const SampleRule rule =
      make_sample_rule(params.temperatures[r], params.top_k[r], params.top_p[r], params.min_p[r]);
  if (rule.is_greedy) {
    params.ids[r] = first_of(row, vocab_size, top, scratch.maxima);
    return;
  }
  double bound = reachable_bound(rule, top);
  if (rule.top_k > 0) {
    bound = std::max(bound, top_k_bound(scratch, num_blocks(vocab_size), rule.top_k));
  }
  Candidates& candidates = scratch.candidates;
  collect(row, vocab_size, bound, scratch);
  // Fewer than k: then what was left out of the k likeliest cannot be drawn anyhow.
  if (rule.top_k > 0 && candidates.count > rule.top_k) {
    const auto k = static_cast<uint64_t>(rule.top_k);
    cut_at(candidates, find_border(candidates, k, [](int64_t) { return uint64_t{1}; }), 1);
  }
  kernels().sample_weights(candidates.logits, candidates.count, top, rule.inverse_temperature,
                           candidates.weights);
  if (rule.top_p < 1.0F) apply_top_p(candidates, rule, top);
  const uint64_t bits = keyed_bits(static_cast<uint64_t>(params.seeds[r]),
                                   static_cast<uint64_t>(params.positions[r]));
  params.ids[r] = draw(candidates, rule.min_weight, bits);
}

}  // namespace

int64_t sample_scratch_bytes(int64_t vocab_size) {
  static_assert(sizeof(float) == 4 && sizeof(int32_t) == 4);
  const int64_t bytes = 4 * (4 * vocab_size + 2 * num_blocks(vocab_size));
  return (bytes + 15) / 16 * 16;
}

void sample(const SampleParams& params, void* scratch, int64_t num_slots,
            ParallelFor parallel_for) {
  const int64_t slot_bytes = sample_scratch_bytes(params.vocab_size);
  parallel_for(num_slots, /*grain=*/1, [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; ++slot) {
      RowScratch memory(static_cast<char*>(scratch) + slot * slot_bytes, params.vocab_size);
      for (int64_t r = slot; r < params.num_rows; r += num_slots) sample_row(params, r, memory);
    }
  });
}

}  // namespace skv::cpu
