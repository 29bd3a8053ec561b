// Draws a token from each row of logits by the rule of csrc/kernels/sample_rule.h; one thread block
// a row. Everything is counted in integers, so the order of atomics is of no account.
//
// One search serves all purposes: of items with keys and amounts, the largest key at which the
// amounts of that and all larger keys reach a target. With the logit as key it finds the border of
// top-k (amount 1) and of top-p (amount: the weight); with V - 1 - id as key it finds which of
// equal logits the border falls on, and the token that is drawn.
//
// The row is read three times: for its largest logit, for a histogram of what is below it, and for
// the tokens above the part of that histogram in which the first border lies. These fit a list in
// shared memory unless thousands of tokens stay; then the searches read the row instead.
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <limits>

#include "csrc/kernels/cuda/dispatch.h"
#include "csrc/kernels/cuda/element.cuh"
#include "csrc/kernels/cuda/kernels.h"
#include "csrc/kernels/cuda/launch.h"
#include "csrc/kernels/sample_rule.h"

namespace skv::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kBinBits = 10;
constexpr int kBins = 1 << kBinBits;
static_assert(kBins == kThreads, "a thread looks after one bin");
constexpr int kListSize = 4096;
constexpr uint32_t kNanKey = 0xFFFFFFFFu;  // above all numbers
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Place {
  uint32_t bin;
  uint64_t before;  // amount in the bins before it
  uint64_t at;      // amount in it
};

struct Shared {
  uint32_t low[kBins];  // the histogram: low and high halves of sums, as 32-bit atomics are native
  uint32_t high[kBins];
  uint64_t warp_sums[kWarps];
  Place place;
  uint64_t random_bits;
  uint32_t list_count;
  float list_logits[kListSize];
  int32_t list_ids[kListSize];
};

__device__ __forceinline__ void add_to_bin(Shared& shared, uint32_t bin, uint64_t amount) {
  const auto low = static_cast<uint32_t>(amount);
  auto carry = static_cast<uint32_t>(amount >> 32);
  if (low != 0 && atomicAdd(&shared.low[bin], low) > ~low) ++carry;
  if (carry != 0) atomicAdd(&shared.high[bin], carry);
}

// The largest of the block's values, in every thread.
__device__ uint64_t block_max(Shared& shared, uint64_t value) {
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
    const uint64_t other = __shfl_xor_sync(kFullWarp, value, mask);
    value = other > value ? other : value;
  }
  if (threadIdx.x % kWarpSize == 0) shared.warp_sums[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  for (int warp = 0; warp < kWarps; ++warp) {
    const uint64_t other = shared.warp_sums[warp];
    value = other > value ? other : value;
  }
  __syncthreads();
  return value;
}

// The first bin at which the running sum reaches target_of(sum of all bins); false if none does.
// All threads get the same; `target` becomes that target. Ends and begins with a barrier.
template <typename TargetOf>
__device__ bool find_bin(Shared& shared, TargetOf target_of, uint64_t& target) {
  __syncthreads();
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarpSize;
  const int warp = thread / kWarpSize;
  const uint64_t own = (static_cast<uint64_t>(shared.high[thread]) << 32) + shared.low[thread];
  uint64_t sum = own;
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const uint64_t other = __shfl_up_sync(kFullWarp, sum, distance);
    if (lane >= distance) sum += other;
  }
  if (lane == kWarpSize - 1) shared.warp_sums[warp] = sum;
  __syncthreads();
  uint64_t total = 0;
  for (int i = 0; i < kWarps; ++i) {
    const uint64_t part = shared.warp_sums[i];
    if (i < warp) sum += part;
    total += part;
  }
  target = target_of(total);
  const uint64_t before = sum - own;
  if (before < target && target <= sum) {
    shared.place = {static_cast<uint32_t>(thread), before, own};
  }
  __syncthreads();
  return target <= total;
}

struct Border {
  bool is_found;
  uint32_t key;
  uint64_t missing;  // what the larger keys lack of the target
  uint64_t at;       // amount of the items with this key
};

// Searches keys in [low, high]. for_items(low, high, sink) calls sink(key, amount) for this
// thread's items, at least for those with keys in that interval, which shrinks from pass to pass;
// target_of gets the amount of all. Not found: they do not reach the target, which must be >= 1.
template <typename ForItems, typename TargetOf>
__device__ Border find_border(Shared& shared, uint32_t low, uint32_t high, ForItems for_items,
                              TargetOf target_of) {
  uint64_t target = 0;
#pragma unroll 1
  for (bool is_first = true;; is_first = false) {
    const uint32_t width = high - low;
    const int bits = kWarpSize - __clz(static_cast<int>(width));
    const int shift = bits > kBinBits ? bits - kBinBits : 0;
    shared.low[threadIdx.x] = 0;
    shared.high[threadIdx.x] = 0;
    __syncthreads();
    for_items(low, high, [&](uint32_t key, uint64_t amount) {
      const uint32_t below = high - key;
      if (amount != 0 && below <= width) add_to_bin(shared, below >> shift, amount);
    });
    const uint64_t missing = target;
    const bool is_found = find_bin(
        shared, [&](uint64_t total) { return is_first ? target_of(total) : missing; }, target);
    if (!is_found) return {false, 0, 0, 0};
    const Place place = shared.place;
    target -= place.before;
    high -= place.bin << shift;
    const uint32_t rest = (uint32_t{1} << shift) - 1;
    low = high - low > rest ? high - rest : low;
    if (shift == 0) return {true, high, target, place.at};
  }
}

// All logits of a row, in global memory. Calls body(id, logit) for this thread's part of the ids
// from first to last: 16 bytes at a time, the next ones on their way meanwhile.
template <typename T>
struct RowSource {
  const T* logits;

  template <typename Body>
  __device__ __forceinline__ void for_each(int32_t first, int32_t last, Body body) const {
    constexpr int kPer = 16 / static_cast<int>(sizeof(T));
    const T* const begin = logits + first;
    const int32_t size = last - first + 1;
    const auto offset = static_cast<int32_t>(reinterpret_cast<uintptr_t>(begin) % 16 / sizeof(T));
    const int32_t unaligned = (kPer - offset) % kPer;
    const int32_t head = unaligned < size ? unaligned : size;
    const int32_t num_vectors = (size - head) / kPer;
    const auto* const vectors = reinterpret_cast<const uint4*>(begin + head);

    auto vector = static_cast<int32_t>(threadIdx.x);
    uint4 next{};
    if (vector < num_vectors) next = __ldg(vectors + vector);
#pragma unroll 1
    while (vector < num_vectors) {
      T values[kPer];
      memcpy(values, &next, sizeof(values));
      const int32_t id = first + head + vector * kPer;
      vector += kThreads;
      if (vector < num_vectors) next = __ldg(vectors + vector);
#pragma unroll
      for (int i = 0; i < kPer; ++i) body(id + i, to_float(values[i]));
    }
    const int32_t num_single = size - num_vectors * kPer;
#pragma unroll 1
    for (auto i = static_cast<int32_t>(threadIdx.x); i < num_single; i += kThreads) {
      const int32_t at = i < head ? i : i + num_vectors * kPer;
      body(first + at, to_float(begin[at]));
    }
  }
};

// The tokens collected in shared memory, in any order; all of them, whatever the interval.
struct ListSource {
  const Shared& shared;

  template <typename Body>
  __device__ __forceinline__ void for_each(int32_t /*first*/, int32_t /*last*/, Body body) const {
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < shared.list_count; i += kThreads) {
      body(shared.list_ids[i], shared.list_logits[i]);
    }
  }
};

// Tokens that stay: those with keys above `key`, and at it those with ids below `id_end`.
struct Cut {
  uint32_t key;
  int32_t id_end;

  __device__ __forceinline__ bool keeps(uint32_t token_key, int32_t id) const {
    return token_key > key || (token_key == key && id < id_end);
  }
};

struct Row {
  SampleRule rule;
  float top;
  int32_t vocab_size;
  uint32_t low_key;  // no border lies below

  __device__ __forceinline__ uint64_t weight(float logit) const {
    return static_cast<uint64_t>(
        sample_weight(Rounded{logit}, Rounded{top}, Rounded{rule.inverse_temperature}).v);
  }

  // From 0 for the largest logit to kBins - 1; kBins for logits whose weight is 0 for sure.
  __device__ __forceinline__ uint32_t bin(float logit) const {
    const float t =
        sample_exponent(Rounded{logit}, Rounded{top}, Rounded{rule.inverse_temperature}).v;
    if (!(t > kLowestExponent)) return kBins;
    const auto bin = static_cast<uint32_t>(t * (kBins / kLowestExponent));
    return bin < kBins ? bin : kBins - 1;
  }

  // A key below those of all logits in the bins up to `bin`: one bin of margin for roundings.
  __device__ uint32_t key_below(uint32_t bin) const {
    const float exponent = static_cast<float>(bin + 2) * (kLowestExponent / kBins);
    return order_key(top + exponent / rule.inverse_temperature);
  }
};

// Cuts where the amounts of kept tokens, largest logit first, reach the target: 1 for each that may
// have a weight, or their weights. Leaves the cut as it is if they never do.
template <typename Source, typename TargetOf>
__device__ Cut narrow(Shared& shared, const Row& row, const Source& source, Cut cut, bool by_count,
                      TargetOf target_of) {
  const int32_t last_id = row.vocab_size - 1;
  const Border border = find_border(
      shared, row.low_key, order_key(row.top),
      [&](uint32_t, uint32_t, auto sink) {
        source.for_each(0, last_id, [&](int32_t id, float logit) {
          const uint32_t key = order_key(logit);
          if (!cut.keeps(key, id)) return;
          sink(key, by_count ? uint64_t{row.bin(logit) < kBins} : row.weight(logit));
        });
      },
      target_of);
  if (!border.is_found) return cut;
  const uint64_t each = by_count ? 1 : row.weight(value_of_key(border.key));
  const uint64_t num_equal = (border.missing + each - 1) / each;
  if (num_equal * each == border.at) {  // all that are left of them
    return {border.key, border.key == cut.key ? cut.id_end : row.vocab_size};
  }
  const Border last = find_border(
      shared, 0, static_cast<uint32_t>(last_id),
      [&](uint32_t low, uint32_t high, auto sink) {
        const int32_t first = last_id - static_cast<int32_t>(high);
        source.for_each(first, last_id - static_cast<int32_t>(low), [&](int32_t id, float logit) {
          const bool is_equal = order_key(logit) == border.key && cut.keeps(border.key, id);
          sink(static_cast<uint32_t>(last_id - id), is_equal ? 1 : 0);
        });
      },
      [&](uint64_t) { return num_equal; });
  return {border.key, last_id - static_cast<int32_t>(last.key) + 1};
}

template <typename Source>
__device__ int64_t draw(Shared& shared, const Row& row, const Source& source, Cut cut) {
  const int32_t last_id = row.vocab_size - 1;
  const Border drawn = find_border(
      shared, 0, static_cast<uint32_t>(last_id),
      [&](uint32_t low, uint32_t high, auto sink) {
        const int32_t first = last_id - static_cast<int32_t>(high);
        source.for_each(first, last_id - static_cast<int32_t>(low), [&](int32_t id, float logit) {
          if (!cut.keeps(order_key(logit), id)) return;
          const uint64_t weight = row.weight(logit);
          sink(static_cast<uint32_t>(last_id - id), weight >= row.rule.min_weight ? weight : 0);
        });
      },
      [&](uint64_t total) { return draw_target(shared.random_bits, total) + 1; });
  return last_id - static_cast<int64_t>(drawn.key);
}

// `top_p_sum`: what top-p asks for without a top-k before it.
template <typename Source>
__device__ int64_t filter_and_draw(Shared& shared, const Row& row, const Source& source,
                                   uint64_t top_p_sum) {
  const SampleRule& rule = row.rule;
  const auto k = static_cast<uint64_t>(rule.top_k);
  Cut cut{0, row.vocab_size};
  if (k > 0) {
    cut = narrow(shared, row, source, cut, true, [&](uint64_t) { return k; });
  }
  if (rule.top_p < 1.0F) {
    cut = narrow(shared, row, source, cut, false, [&](uint64_t total) {
      return k > 0 ? top_p_target(rule.top_p, total) : top_p_sum;
    });
  }
  return draw(shared, row, source, cut);
}

// The bin of the first border, or the last bin if there is none; what the border was looked for by.
template <typename T>
__device__ uint32_t find_last_bin(Shared& shared, const Row& row, const RowSource<T>& source,
                                  uint64_t& target) {
  const bool by_count = row.rule.top_k > 0;
  const Border border = find_border(
      shared, 0, kBins - 1,
      [&](uint32_t, uint32_t, auto sink) {
        source.for_each(0, row.vocab_size - 1, [&](int32_t, float logit) {
          const uint32_t bin = row.bin(logit);
          if (bin < kBins) sink(kBins - 1 - bin, by_count ? 1 : row.weight(logit));
        });
      },
      [&](uint64_t total) {
        target =
            by_count ? static_cast<uint64_t>(row.rule.top_k) : top_p_target(row.rule.top_p, total);
        return target;
      });
  return border.is_found ? kBins - 1 - border.key : kBins - 1;
}

template <typename T>
__device__ int64_t sample_row(Shared& shared, Row& row, const RowSource<T>& source) {
  if (row.rule.top_k >= row.vocab_size) row.rule.top_k = 0;
  if (row.rule.top_k == 0 && row.rule.top_p >= 1.0F) {
    return draw(shared, row, source, {0, row.vocab_size});
  }
  uint64_t target = 0;
  const uint32_t last_bin = find_last_bin(shared, row, source, target);
  row.low_key = row.key_below(last_bin);
  if (threadIdx.x == 0) shared.list_count = 0;
  __syncthreads();
  source.for_each(0, row.vocab_size - 1, [&](int32_t id, float logit) {
    if (row.bin(logit) > last_bin) return;
    const uint32_t at = atomicAdd(&shared.list_count, 1u);
    if (at >= kListSize) return;
    shared.list_logits[at] = logit;
    shared.list_ids[at] = id;
  });
  __syncthreads();
  return shared.list_count <= kListSize ? filter_and_draw(shared, row, ListSource{shared}, target)
                                        : filter_and_draw(shared, row, source, target);
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    sample_kernel(const __grid_constant__ SampleParams params) {
  __shared__ Shared shared;
  const int64_t r = blockIdx.x;
  const RowSource<T> source{static_cast<const T*>(params.logits) + r * params.row_stride};
  const auto vocab_size = static_cast<int32_t>(params.vocab_size);

  // The largest key, and of equals the lowest id.
  uint64_t best = 0;
  source.for_each(0, vocab_size - 1, [&](int32_t id, float logit) {
    const uint32_t key = logit == logit ? order_key(logit) : kNanKey;
    const uint64_t ordered = (static_cast<uint64_t>(key) << 32) | ~static_cast<uint32_t>(id);
    best = ordered > best ? ordered : best;
  });
  if (threadIdx.x == 0) {
    shared.random_bits = keyed_bits(static_cast<uint64_t>(params.seeds[r]),
                                    static_cast<uint64_t>(params.positions[r]));
  }
  best = block_max(shared, best);
  const auto top_key = static_cast<uint32_t>(best >> 32);
  const float top = top_key == kNanKey ? float_from_bits(0x7FC00000u) : value_of_key(top_key);
  const SampleRule rule =
      make_sample_rule(params.temperatures[r], params.top_k[r], params.top_p[r], params.min_p[r]);
  int64_t id = ~static_cast<uint32_t>(best);
  if (!rule.is_greedy && fabsf(top) < kInfinity) {
    Row row{rule, top, vocab_size, 0};
    id = sample_row(shared, row, source);
  }
  if (threadIdx.x == 0) {
    params.ids[r] = id;
    params.values[r] = top;
  }
}

}  // namespace

cudaError_t sample(const SampleParams& params, cudaStream_t stream) {
  if (!fits_grid(params.num_rows) || params.vocab_size < 1 || !fits_int32(params.vocab_size)) {
    return cudaErrorInvalidValue;
  }
  if (params.num_rows == 0) return cudaSuccess;
  return dispatch_dtype(params.logits_dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return launch_kernel(sample_kernel<T>, {params.num_rows, kThreads}, stream, params);
  });
}

}  // namespace skv::cuda
