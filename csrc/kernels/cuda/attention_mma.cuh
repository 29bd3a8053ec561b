// The two matrix products of a tile, by warps of sixteen query vectors. Every element of a product
// is one chain over ascending k, sixteen at a time, whatever the other rows are.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "csrc/kernels/cuda/attention_ring.cuh"
#include "csrc/kernels/cuda/attention_softmax.cuh"
#include "csrc/kernels/cuda/ptx.cuh"
#include "csrc/kernels/cuda/wgmma.cuh"

namespace skv::cuda {

// Blocks of eight value columns that a warp sums.
template <int kHeadDim>
inline constexpr int kSumBlocks = static_cast<int>(warp_columns(kHeadDim)) / 8;

// The first of these columns.
template <int kHeadDim>
__device__ __forceinline__ int first_column() {
  if constexpr (row_warps(kHeadDim) == 1) return 0;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  return warp % row_warps(kHeadDim) * static_cast<int>(warp_columns(kHeadDim));
}

// Accumulators of a warp: [.][2 * row + column] of eight columns each, as TileScores.
template <int kHeadDim>
using TileSums = float[kSumBlocks<kHeadDim>][4];

// Q of a warp as A fragments: in registers, or in shared memory for the largest head dim, where
// they would be as many as the accumulators.
template <int kHeadDim>
struct QueryFragments {
  static constexpr int kSteps = kHeadDim / 16;
  static constexpr bool kIsShared = RingShape<uint16_t, kHeadDim>::kIsQueryShared;
  uint32_t values[kIsShared ? 1 : kSteps][4];
  int offset;  // in shared memory, of [kWarpRows, D] placed by tile_piece

  __device__ __forceinline__ void load(const unsigned char* shared, int step,
                                       uint32_t (&fragment)[4]) const {
    if constexpr (kIsShared) {
      const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
      const LanePieces<kHeadDim> pieces(offset, lane % 16, lane / 16);
      ldmatrix_x4(fragment, shared + pieces.at(0, step));
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) fragment[i] = values[step][i];
    }
  }
};

// scores = Q K^T for the 64 keys of a tile.
template <typename T, int kHeadDim>
__device__ __forceinline__ void multiply_keys(const QueryFragments<kHeadDim>& query,
                                              const unsigned char* shared, int keys,
                                              TileScores& scores) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const LanePieces<kHeadDim> pieces(keys, lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
  for (int block = 0; block < kKeyBlocks; ++block) {
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[block][i] = 0.0f;
  }
  // Fragments in registers need constant indices; the others would only be loaded too early.
  [[maybe_unused]] constexpr int kUnrolled =
      QueryFragments<kHeadDim>::kIsShared ? 4 : kHeadDim / 16;
#pragma unroll kUnrolled
  for (int step = 0; step < kHeadDim / 16; ++step) {
    uint32_t a[4];
    query.load(shared, step, a);
#pragma unroll
    for (int pair = 0; pair < kKeyBlocks / 2; ++pair) {
      uint32_t b[4];
      ldmatrix_x4(b, shared + pieces.at(pair, step));
      mma_m16n8k16<T>(scores[2 * pair], a, {b[0], b[1]});
      mma_m16n8k16<T>(scores[2 * pair + 1], a, {b[2], b[3]});
    }
  }
}

// P of a warp as A fragments: the accumulators of the scores have the right places once they are
// rounded.
using WeightFragments = uint32_t[kTileKeys / 16][4];

template <typename T>
__device__ __forceinline__ void round_weights(const TileScores& weights,
                                              WeightFragments& fragments) {
#pragma unroll
  for (int step = 0; step < kTileKeys / 16; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float (&block)[4] = weights[2 * step + i / 2];
      fragments[step][i] = pack2<T>(block[i % 2 * 2], block[i % 2 * 2 + 1]);
    }
  }
}

// sums += P V for the 64 keys of a tile.
template <typename T, int kHeadDim>
__device__ __forceinline__ void add_values(const WeightFragments& weights,
                                           const unsigned char* shared, int values,
                                           TileSums<kHeadDim>& sums) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const LanePieces<kHeadDim> pieces(values, lane % 16, lane / 16 + first_column<kHeadDim>() / 8);
#pragma unroll
  for (int step = 0; step < kTileKeys / 16; ++step) {
#pragma unroll
    for (int pair = 0; pair < kSumBlocks<kHeadDim> / 2; ++pair) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, shared + pieces.at(step, pair));
      mma_m16n8k16<T>(sums[2 * pair], weights[step], {b[0], b[1]});
      mma_m16n8k16<T>(sums[2 * pair + 1], weights[step], {b[2], b[3]});
    }
  }
}

// The same two products by the four warps of a warpgroup at once: the operands of K and V are read
// from shared memory as they lie there. Every warp of the warpgroup takes part.
#if defined(SKV_HAS_WGMMA)
template <typename T, int kHeadDim>
__device__ __forceinline__ void multiply_keys_by_warpgroup(const QueryFragments<kHeadDim>& query,
                                                           const unsigned char* shared, int keys,
                                                           TileScores& scores) {
  static_assert(kIsColumnTiled<kHeadDim>);
  auto& flat = reinterpret_cast<float (&)[4 * kKeyBlocks]>(scores);
#pragma unroll
  for (int i = 0; i < 4 * kKeyBlocks; ++i) flat[i] = 0.0f;
  hold_registers(flat);
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; ++step) hold_registers(query.values[step]);
  warpgroup_arrive();
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; ++step) {
    const int columns = keys + step / 4 * kColumnTileBytes + step % 4 * 32;
    warpgroup_scores<T>(flat, query.values[step],
                        swizzled_operand(shared + columns, 0, kSwizzleAtomBytes));
  }
  warpgroup_commit();
  warpgroup_wait<0>();
  hold_registers(flat);
}

template <typename T, int kHeadDim>
__device__ __forceinline__ void add_values_by_warpgroup(const WeightFragments& weights,
                                                        const unsigned char* shared, int values,
                                                        TileSums<kHeadDim>& sums) {
  static_assert(kIsColumnTiled<kHeadDim>);
  auto& flat = reinterpret_cast<float (&)[kHeadDim / 2]>(sums);
  hold_registers(flat);
#pragma unroll
  for (int step = 0; step < kTileKeys / 16; ++step) hold_registers(weights[step]);
  warpgroup_arrive();
#pragma unroll
  for (int step = 0; step < kTileKeys / 16; ++step) {
    warpgroup_values<T>(flat, weights[step],
                        swizzled_operand(shared + values + step * 2 * kSwizzleAtomBytes,
                                         kColumnTileBytes, kSwizzleAtomBytes));
  }
  warpgroup_commit();
  warpgroup_wait<0>();
  hold_registers(flat);
}
#endif

// sums *= decay, row by row. Most tiles do not raise a maximum, and a product with 1 changes no
// bit.
template <int kHeadDim>
__device__ __forceinline__ void decay_sums(TileSums<kHeadDim>& sums, const float (&decay)[2]) {
  if (!__any_sync(kFullWarp, decay[0] != 1.0f || decay[1] != 1.0f)) return;
#pragma unroll
  for (int block = 0; block < kSumBlocks<kHeadDim>; ++block) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[block][i] *= decay[i / 2];
  }
}

}  // namespace skv::cuda
