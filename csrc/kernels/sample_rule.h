// The rule by which a token is drawn from a row of logits, for CPU and CUDA alike.
//
// A token's weight is an integer, floor(2^32 * e^((logit - top) / T)), top being the row's largest
// logit. Integer sums have no order, so neither batch nor threads nor the algorithm can change a
// result. The float operations behind a weight round once each and are never fused, so every
// device and instruction set gets the same weights:
//
//   1. top-k: the k largest logits stay (of equals those with the lowest ids);
//   2. top-p: of these the fewest, largest first, whose weights reach top_p of their sum;
//   3. min-p: of these the ones with at least min_p of the largest weight, which is 2^32;
//   4. of what is left, in the order of ids, the first token at which the running sum of weights
//      exceeds floor(u * sum), u = keyed_bits(seed, position) / 2^64 cut to 53 bits.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "csrc/kernels/host_device.h"
#include "csrc/kernels/philox.h"

namespace skv {

// The one-lane counterpart of cpu::Vec: what sample_weight needs, each operation rounded once.
struct Rounded {
  float v;
  static SKV_HOST_DEVICE Rounded set1(float x) { return {x}; }
};

#if defined(__CUDA_ARCH__)
SKV_HOST_DEVICE Rounded operator+(Rounded a, Rounded b) { return {__fadd_rn(a.v, b.v)}; }
SKV_HOST_DEVICE Rounded operator-(Rounded a, Rounded b) { return {__fsub_rn(a.v, b.v)}; }
SKV_HOST_DEVICE Rounded operator*(Rounded a, Rounded b) { return {__fmul_rn(a.v, b.v)}; }
#else
SKV_HOST_DEVICE Rounded operator+(Rounded a, Rounded b) { return {a.v + b.v}; }
SKV_HOST_DEVICE Rounded operator-(Rounded a, Rounded b) { return {a.v - b.v}; }
SKV_HOST_DEVICE Rounded operator*(Rounded a, Rounded b) { return {a.v * b.v}; }
#endif
SKV_HOST_DEVICE Rounded max(Rounded a, Rounded b) { return {a.v > b.v ? a.v : b.v}; }
SKV_HOST_DEVICE Rounded round_to_int(Rounded a) { return {rintf(a.v)}; }
SKV_HOST_DEVICE Rounded select_less(Rounded x, Rounded bound, Rounded a, Rounded b) {
  return x.v < bound.v ? a : b;
}

SKV_HOST_DEVICE uint32_t float_bits(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  return std::bit_cast<uint32_t>(value);
#endif
}
SKV_HOST_DEVICE float float_from_bits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  return std::bit_cast<float>(bits);
#endif
}

SKV_HOST_DEVICE Rounded scale_by_power_of_two(Rounded x, Rounded n) {
  const auto bits = static_cast<uint32_t>(static_cast<int32_t>(n.v) + 127) << 23;
  return x * Rounded{float_from_bits(bits)};
}

// e^kLowestExponent < 2^-32: from here down every weight is 0.
inline constexpr float kLowestExponent = -22.25F;
inline constexpr uint64_t kLargestWeight = uint64_t{1} << 32;

// (logit - top) / T, at least kLowestExponent. Rises with the logit.
template <typename Float>
SKV_HOST_DEVICE Float sample_exponent(Float logit, Float top, Float inverse_temperature) {
  return max((logit - top) * inverse_temperature, Float::set1(kLowestExponent));
}

// The weight of a token as a float, which holds it exactly. By 2^n * e^r with r in
// [-ln2/2, ln2/2] and a Taylor polynomial of degree 6; ln 2 is split so that n * 0.693359375 has
// no rounding. The error is below 1e-6 of the largest weight.
template <typename Float>
SKV_HOST_DEVICE Float sample_weight(Float logit, Float top, Float inverse_temperature) {
  const Float one = Float::set1(1.0F);
  const Float t = sample_exponent(logit, top, inverse_temperature);
  const Float n = round_to_int(t * Float::set1(1.44269504F));
  const Float r = (t - n * Float::set1(0.693359375F)) + n * Float::set1(2.12194440e-4F);
  Float y = Float::set1(1.0F / 720.0F);
  y = y * r + Float::set1(1.0F / 120.0F);
  y = y * r + Float::set1(1.0F / 24.0F);
  y = y * r + Float::set1(1.0F / 6.0F);
  y = y * r + Float::set1(0.5F);
  y = y * r + one;
  y = y * r + one;
  const Float scaled = scale_by_power_of_two(y, n + Float::set1(32.0F));
  const Float nearest = round_to_int(scaled);
  return select_less(scaled, nearest, nearest - one, nearest);
}

// An integer that orders floats (not NaN) by value: -0 and 0 have the same.
SKV_HOST_DEVICE uint32_t order_key(float value) {
  const uint32_t bits = float_bits(value == 0.0F ? 0.0F : value);
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}
SKV_HOST_DEVICE float value_of_key(uint32_t key) {
  return float_from_bits((key & 0x80000000u) != 0 ? key & 0x7FFFFFFFu : ~key);
}

// How one row is sampled.
struct SampleRule {
  bool is_greedy;             // the rest does not matter then
  float inverse_temperature;  // finite and not denormal
  int64_t top_k;              // 0 = all
  float top_p;                // in [0, 1]; 0 keeps the likeliest token
  uint64_t min_weight;        // from min_p
};

// Of values outside their ranges (the CPU op refuses them) the nearest valid one is taken, and of
// NaN the one that filters nothing; a temperature that is no number > 0 is greedy.
SKV_HOST_DEVICE SampleRule make_sample_rule(float temperature, int64_t top_k, float top_p,
                                            float min_p) {
  SampleRule rule;
  rule.is_greedy = !(temperature > 0.0F);
  const float inverse = rule.is_greedy ? 1.0F : 1.0F / temperature;
  rule.inverse_temperature = fminf(fmaxf(inverse, 0x1p-126F), 0x1.fffffep127F);
  rule.top_k = top_k > 0 ? top_k : 0;
  rule.top_p = top_p >= 0.0F ? fminf(top_p, 1.0F) : (top_p < 0.0F ? 0.0F : 1.0F);
  const float smallest = min_p > 0.0F ? fminf(min_p, 1.0F) : 0.0F;
  rule.min_weight = static_cast<uint64_t>(ceilf(smallest * 0x1p32F));  // the product is exact
  return rule;
}

// The sum of weights that top-p asks for, of tokens that weigh `total` together: in [1, total].
SKV_HOST_DEVICE uint64_t top_p_target(float top_p, uint64_t total) {
  const double wanted = ceil(static_cast<double>(top_p) * static_cast<double>(total));
  const auto target = static_cast<uint64_t>(wanted);
  return target < 1 ? 1 : (target > total ? total : target);
}

// floor(u * total): the token drawn is the first whose running sum exceeds this.
SKV_HOST_DEVICE uint64_t draw_target(uint64_t bits, uint64_t total) {
  return multiply_high(bits & ~uint64_t{0x7FF}, total);
}

}  // namespace skv
