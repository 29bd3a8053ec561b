// Shadow of csrc/kernels/cuda/ptx.cuh: the same functions, described there.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace skv::cuda {

__device__ __forceinline__ void cp_async16(void* shared, const void* global, bool is_valid) {
  emulation::copy_async(shared, global, 16, is_valid);
}
__device__ __forceinline__ void cp_async4(void* shared, const void* global, bool is_valid) {
  emulation::copy_async(shared, global, 4, is_valid);
}
__device__ __forceinline__ void cp_async_commit() { emulation::commit_copies(); }
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  static_assert(kPending >= 0);
  emulation::wait_for_copies(kPending);
}

namespace emulated {

struct LoadMatrix {
  uint32_t* registers;
  const void* row;
};

inline uint16_t element(const LoadMatrix& lane, int index) {
  uint16_t value;
  std::memcpy(&value, static_cast<const char*>(lane.row) + 2 * index, sizeof value);
  return value;
}

template <int kTiles, bool kTransposed>
void load_matrix(void* const* arguments, uint32_t) {
  const auto lane_argument = [&](int lane) -> const LoadMatrix& {
    return *static_cast<const LoadMatrix*>(arguments[lane]);
  };
  for (int tile = 0; tile < kTiles; ++tile) {
    for (int lane = 0; lane < emulation::kWarpSize; ++lane) {
      const int i = lane / 4;
      const int j = 2 * (lane % 4);
      const auto at = [&](int row, int column) -> uint32_t {
        return element(lane_argument(8 * tile + row), column);
      };
      lane_argument(lane).registers[tile] =
          kTransposed ? at(j, i) | at(j + 1, i) << 16 : at(i, j) | at(i, j + 1) << 16;
    }
  }
}

template <int kTiles, bool kTransposed>
void ldmatrix(const char* name, uint32_t (&r)[kTiles], const void* row) {
  if (emulation::current_lane() < 8 * kTiles) {
    if (!emulation::is_shared(row, 16)) emulation::fail("%s: a row is not in shared memory", name);
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0) {
      emulation::fail("%s: a row is not aligned to 16 bytes", name);
    }
  }
  LoadMatrix argument{r, row};
  emulation::warp_operation(name, 0xffffffffu, &argument, load_matrix<kTiles, kTransposed>);
}

struct Mma {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

// Each sum runs over ascending k, one rounding for each product: a product of two 16-bit elements
// is exact in fp32. A tensor core adds several products at once and may round otherwise.
template <typename T>
void multiply(void* const* arguments, uint32_t) {
  float a[16][16];
  float b[16][8];
  float d[16][8];
  const auto widen = [](uint32_t pair, int half) {
    return T::widen(static_cast<uint16_t>(pair >> (16 * half)));
  };
  for (int lane = 0; lane < emulation::kWarpSize; ++lane) {
    const Mma& mine = *static_cast<const Mma*>(arguments[lane]);
    const int g = lane / 4;
    const int t = 2 * (lane % 4);
    for (int half = 0; half < 2; ++half) {
      for (int part = 0; part < 4; ++part) {
        a[g + 8 * (part % 2)][t + 8 * (part / 2) + half] = widen(mine.a[part], half);
      }
      b[t + half][g] = widen(mine.b[0], half);
      b[t + 8 + half][g] = widen(mine.b[1], half);
      d[g][t + half] = mine.d[half];
      d[g + 8][t + half] = mine.d[2 + half];
    }
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int lane = 0; lane < emulation::kWarpSize; ++lane) {
    const Mma& mine = *static_cast<const Mma*>(arguments[lane]);
    const int g = lane / 4;
    const int t = 2 * (lane % 4);
    for (int half = 0; half < 2; ++half) {
      mine.d[half] = d[g][t + half];
      mine.d[2 + half] = d[g + 8][t + half];
    }
  }
}

}  // namespace emulated

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row) {
  emulated::ldmatrix<4, false>("ldmatrix_x4", r, shared_row);
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared_row) {
  emulated::ldmatrix<4, true>("ldmatrix_x4_trans", r, shared_row);
}
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void* shared_row) {
  emulated::ldmatrix<2, false>("ldmatrix_x2", r, shared_row);
}
__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], const void* shared_row) {
  emulated::ldmatrix<2, true>("ldmatrix_x2_trans", r, shared_row);
}

template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
  emulated::Mma argument{d, a, b};
  emulation::warp_operation("mma_m16n8k16", 0xffffffffu, &argument, emulated::multiply<T>);
}

__device__ __forceinline__ float exp2_approx(float x) {
  const float result = std::exp2(x);
  return result < 0x1p-126F ? 0.0F : result;  // NaN stays NaN
}

template <typename T>
__device__ __forceinline__ uint32_t pack2(float low, float high) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
  const auto round = [](float x) -> uint32_t {
    return std::isnan(x) ? emulation::kNan16 : T::round(x);
  };
  return round(low) | round(high) << 16;
}

template <typename T>
__device__ __forceinline__ uint32_t subtract2(uint32_t left, uint32_t right) {
  const auto widen = [](uint32_t half) { return T::widen(static_cast<uint16_t>(half)); };
  return pack2<T>(widen(left) - widen(right), widen(left >> 16) - widen(right >> 16));
}

__device__ __forceinline__ uint32_t byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  return __byte_perm(low, high, selector);
}

// A kernel begins when the one before it has ended.
__device__ __forceinline__ void grid_dependency_wait() {}
__device__ __forceinline__ void grid_dependency_launch() {}

}  // namespace skv::cuda
