// Shadow of csrc/kernels/cuda/wgmma.cuh: the same functions, described there. A product is done
// when it is begun, so a missing wait or fence does not show here.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "csrc/kernels/cuda/ptx.cuh"

namespace skv::cuda {

#define SKV_HAS_WGMMA
inline constexpr bool kHasWarpgroups = true;

inline constexpr uint32_t kSwizzleAtomBytes = 1024;

__device__ __forceinline__ uint64_t swizzled_operand(const void* shared, uint32_t leading,
                                                     uint32_t stride) {
  if (!emulation::is_shared(shared, 16)) emulation::fail("wgmma: an operand is not shared memory");
  const auto offset = static_cast<const unsigned char*>(shared) -
                      static_cast<const unsigned char*>(emulation::dynamic_shared());
  const auto field = [](uint64_t bytes) { return (bytes & 0x3ffff) >> 4; };
  return field(static_cast<uint64_t>(offset)) | field(leading) << 16 | field(stride) << 32 |
         uint64_t{1} << 62;
}

__device__ __forceinline__ unsigned char* aligned_operands(unsigned char* shared) {
  // As far from an aligned address as a device may place it.
  return shared + kSwizzleAtomBytes;
}
__device__ __forceinline__ void unreachable_kernel() { emulation::fail("trap"); }

template <int kSize>
__device__ __forceinline__ void hold_registers(float (&)[kSize]) {}
template <int kSize>
__device__ __forceinline__ void hold_registers(const uint32_t (&)[kSize]) {}
__device__ __forceinline__ void warpgroup_arrive() {}
__device__ __forceinline__ void warpgroup_commit() {}
template <int kPending>
__device__ __forceinline__ void warpgroup_wait() {}
__device__ __forceinline__ void fence_shared_for_products() {}

namespace emulated {

struct WarpgroupMma {
  float* d;
  const uint32_t* a;
  uint64_t b;
};

// Element `column` of row `row` of an operand: rows of 128 bytes in groups of eight, and the
// hardware swaps the 16-byte pieces of an address by the number of its row.
inline uint16_t swizzled_element(uint64_t operand, int row, int column) {
  const auto field = [&](int shift) { return (operand >> shift & 0x3fff) << 4; };
  uint64_t address =
      field(0) + static_cast<uint64_t>(row / 8) * field(32) + static_cast<uint64_t>(row % 8) * 128 +
      static_cast<uint64_t>(column / 64) * field(16) + static_cast<uint64_t>(column % 64) * 2;
  address ^= (address >> 7 & 7) << 4;
  const void* source = static_cast<const unsigned char*>(emulation::dynamic_shared()) + address;
  if (!emulation::is_shared(source, 2)) emulation::fail("wgmma: an operand leaves shared memory");
  uint16_t element;
  std::memcpy(&element, source, sizeof element);
  return element;
}

// The sixteen rows of one warp, in the order of mma_m16n8k16. kIsTransposed: b lies as [N][16].
template <typename T, int kColumns, bool kIsTransposed>
void multiply_warpgroup(void* const* arguments, uint32_t) {
  const auto mine = [&](int lane) -> const WarpgroupMma& {
    return *static_cast<const WarpgroupMma*>(arguments[lane]);
  };
  const uint64_t operand = mine(0).b;
  for (int lane = 0; lane < emulation::kWarpSize; ++lane) {
    if (mine(lane).b != operand) emulation::fail("wgmma: lanes differ in their operand");
  }
  float b[16][kColumns];
  for (int k = 0; k < 16; ++k) {
    for (int n = 0; n < kColumns; ++n) {
      b[k][n] = T::widen(kIsTransposed ? swizzled_element(operand, n, k)
                                       : swizzled_element(operand, k, n));
    }
  }
  for (int lane = 0; lane < emulation::kWarpSize; ++lane) {
    for (int i = 0; i < kColumns / 2; ++i) {
      const int row = i / 2 % 2;
      const int column = 8 * (i / 4) + 2 * (lane % 4) + i % 2;
      float sum = mine(lane).d[i];
      for (int k = 0; k < 16; ++k) {
        const uint32_t pair = mine(lane / 4 * 4 + k % 8 / 2).a[row + 2 * (k / 8)];
        sum += T::widen(static_cast<uint16_t>(pair >> (16 * (k % 2)))) * b[k][column];
      }
      mine(lane).d[i] = sum;
    }
  }
}

template <typename T, int kColumns, bool kIsTransposed>
void begin_product(const char* name, float* d, const uint32_t* a, uint64_t b) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
  if (blockDim.x % 128 != 0) emulation::fail("%s: expected whole warpgroups", name);
  WarpgroupMma argument{d, a, b};
  emulation::warp_operation(name, 0xffffffffu, &argument,
                            multiply_warpgroup<T, kColumns, kIsTransposed>);
}

}  // namespace emulated

template <typename T>
__device__ __forceinline__ void warpgroup_scores(float (&d)[32], const uint32_t (&a)[4],
                                                 uint64_t b) {
  emulated::begin_product<T, 64, true>("warpgroup_scores", d, a, b);
}
template <typename T>
__device__ __forceinline__ void warpgroup_values(float (&d)[32], const uint32_t (&a)[4],
                                                 uint64_t b) {
  emulated::begin_product<T, 64, false>("warpgroup_values", d, a, b);
}
template <typename T>
__device__ __forceinline__ void warpgroup_values(float (&d)[64], const uint32_t (&a)[4],
                                                 uint64_t b) {
  emulated::begin_product<T, 128, false>("warpgroup_values", d, a, b);
}

}  // namespace skv::cuda
