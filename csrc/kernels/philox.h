// Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3"): random bits as a
// function of a key, without a state that somebody would have to keep.
#pragma once

#include <cstdint>

#include "csrc/kernels/host_device.h"

namespace skv {

// The upper half of a 128-bit product.
SKV_HOST_DEVICE uint64_t multiply_high(uint64_t a, uint64_t b) {
#if defined(__CUDA_ARCH__)
  return __umul64hi(a, b);
#else
  __extension__ using Wide = unsigned __int128;
  return static_cast<uint64_t>((Wide{a} * b) >> 64);
#endif
}

// The first number of numpy.random.Philox(key=[seed, position]).random_raw(): word 0 of the block
// at counter 1, since numpy increments the counter before its first block.
SKV_HOST_DEVICE uint64_t keyed_bits(uint64_t seed, uint64_t position) {
  uint64_t word[4] = {1, 0, 0, 0};
  uint64_t key[2] = {seed, position};
  for (int round = 0; round < 10; ++round) {
    const uint64_t high0 = multiply_high(0xD2E7470EE14C6C93u, word[0]);
    const uint64_t low0 = 0xD2E7470EE14C6C93u * word[0];
    const uint64_t high1 = multiply_high(0xCA5A826395121157u, word[2]);
    const uint64_t low1 = 0xCA5A826395121157u * word[2];
    word[0] = high1 ^ word[1] ^ key[0];
    word[1] = low1;
    word[2] = high0 ^ word[3] ^ key[1];
    word[3] = low0;
    key[0] += 0x9E3779B97F4A7C15u;
    key[1] += 0xBB67AE8584CAA73Bu;
  }
  return word[0];
}

}  // namespace skv
