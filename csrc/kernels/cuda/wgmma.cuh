// Warpgroup products of Hopper (wgmma): the other file with asm beside ptx.cuh, and like that one
// replaced by the emulator of tests/emulation. Only code for sm_90a may call what is here.
//
// Operands in shared memory are tiles of rows of 64 elements (128 bytes), rows packed, the first
// row at a multiple of 1024 bytes; within a row the 16-byte piece p of row r lies at p ^ (r % 8)
// (the 128-byte swizzle). Wider operands are several such tiles one after the other.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "csrc/kernels/cuda/ptx.cuh"

namespace skv::cuda {

// Defined where the functions below may be called.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define SKV_HAS_WGMMA
inline constexpr bool kHasWarpgroups = true;
#else
inline constexpr bool kHasWarpgroups = false;
#endif

inline constexpr uint32_t kSwizzleAtomBytes = 1024;  // eight rows of 128 bytes

// Where an operand begins, and how its parts follow each other: the descriptor of a matrix in
// shared memory with the 128-byte swizzle. `stride` are the bytes between groups of eight rows,
// `leading` those between tiles of 64 columns of an operand that is read across its rows.
__device__ __forceinline__ uint64_t swizzled_operand(const void* shared, uint32_t leading,
                                                     uint32_t stride) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  const auto field = [](uint32_t bytes) { return static_cast<uint64_t>((bytes & 0x3ffff) >> 4); };
  return field(shared_address(shared)) | field(leading) << 16 | field(stride) << 32 | kSwizzle128;
}

// The first address at or after `shared` where operands may begin.
__device__ __forceinline__ unsigned char* aligned_operands(unsigned char* shared) {
  return shared +
         (kSwizzleAtomBytes - shared_address(shared) % kSwizzleAtomBytes) % kSwizzleAtomBytes;
}

// The compiler takes a product for done where it is begun. Called before warpgroup_arrive() and
// after warpgroup_wait() this keeps it from moving a write of the operands behind the first, or a
// use of the sums before the second.
template <int kSize>
__device__ __forceinline__ void hold_registers(float (&values)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) asm volatile("" : "+f"(values[i])::"memory");
}
template <int kSize>
__device__ __forceinline__ void hold_registers(const uint32_t (&values)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) asm volatile("" ::"r"(values[i]) : "memory");
}

// Orders register writes before, and shared memory accesses before, the products that follow.
__device__ __forceinline__ void warpgroup_arrive() {
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
}
__device__ __forceinline__ void warpgroup_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}
// Waits until at most kPending of the warpgroup's youngest groups are unfinished.
template <int kPending>
__device__ __forceinline__ void warpgroup_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
}

// Makes what this thread wrote to shared memory visible to products, which read it by another way.
// To be followed by a barrier of all writers and readers.
__device__ __forceinline__ void fence_shared_for_products() {
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}

#define SKV_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SKV_D16(i) SKV_D4(i), SKV_D4(i + 4), SKV_D4(i + 8), SKV_D4(i + 12)
#define SKV_D32 SKV_D16(0), SKV_D16(16)
#define SKV_D64 SKV_D32, SKV_D16(32), SKV_D16(48)

// d[64][64] += a[64][16] * b[64][16]^T, begun, not awaited: d, a and b are not to be touched before
// the wait. b are 64 rows, 16 columns from where the operand begins. Fragments are those of
// mma_m16n8k16, rows 16w + [0, 16) in warp w of the four; d[4n .. 4n + 3] are those of columns 8n.
template <typename T>
__device__ __forceinline__ void warpgroup_scores(float (&d)[32], const uint32_t (&a)[4],
                                                 uint64_t b) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "
        "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
        "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 0;\n"
        : SKV_D32
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  } else {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "
        "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
        "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 0;\n"
        : SKV_D32
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  }
}

// d[64][N] += a[64][16] * b[16][N], in the same way; N is twice the size of d. b are 16 rows, each
// N / 64 tiles wide.
template <typename T>
__device__ __forceinline__ void warpgroup_values(float (&d)[32], const uint32_t (&a)[4],
                                                 uint64_t b) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "
        "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
        "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;\n"
        : SKV_D32
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  } else {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "
        "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
        "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;\n"
        : SKV_D32
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  }
}
template <typename T>
__device__ __forceinline__ void warpgroup_values(float (&d)[64], const uint32_t (&a)[4],
                                                 uint64_t b) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "
        "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, "
        "%34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, "
        "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
        "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;\n"
        : SKV_D64
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  } else {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "
        "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, "
        "%34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, "
        "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
        "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;\n"
        : SKV_D64
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  }
}

#undef SKV_D4
#undef SKV_D16
#undef SKV_D32
#undef SKV_D64

__device__ __forceinline__ void unreachable_kernel() { asm volatile("trap;\n"); }

}  // namespace skv::cuda
