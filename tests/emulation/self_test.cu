// What the emulator promises, checked with kernels made for it. Prints what fails; the exit status
// is the number of failures. Passes in every order (SKV_EMULATION_ORDER, SKV_EMULATION_COPIES).
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "csrc/kernels/cuda/launch.h"
#include "csrc/kernels/cuda/ptx.cuh"
#include "csrc/kernels/cuda/wgmma.cuh"

namespace skv::cuda {
namespace {

int num_failures = 0;

void expect(bool is_true, const char* what) {
  if (is_true) return;
  std::printf("FAILED: %s\n", what);
  ++num_failures;
}

template <typename Kernel, typename... Arguments>
std::string run(Kernel kernel, LaunchShape shape, Arguments... arguments) {
  const cudaError_t status = launch_kernel(kernel, shape, nullptr, arguments...);
  return status == cudaSuccess ? "" : cudaGetErrorString(status);
}

// The launch must fail and say all of this.
template <typename Kernel, typename... Arguments>
void expect_failure(std::vector<const char*> texts, Kernel kernel, LaunchShape shape,
                    Arguments... arguments) {
  const std::string message = run(kernel, shape, arguments...);
  for (const char* text : texts) {
    if (message.find(text) != std::string::npos) continue;
    std::printf("FAILED: expected '%s' in the error, got '%s'\n", text, message.c_str());
    ++num_failures;
  }
}

// ---- Tensor cores

constexpr int kPitch = 24;  // elements between rows in shared memory

// c[16][8] = a[16][16] b[16][8], b given as its transpose [8][16] (x2 loads) and as it is (trans).
template <typename T>
__global__ void product_kernel(const T* a, const T* b_transposed, const T* b, float* c,
                               float* c_trans) {
  __shared__ __align__(16) T tile_a[16 * kPitch];
  __shared__ __align__(16) T tile_bt[8 * kPitch];
  __shared__ __align__(16) T tile_b[16 * kPitch];
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = lane; i < 256; i += 32) tile_a[i / 16 * kPitch + i % 16] = a[i];
  for (int i = lane; i < 128; i += 32) tile_bt[i / 16 * kPitch + i % 16] = b_transposed[i];
  for (int i = lane; i < 128; i += 32) tile_b[i / 8 * kPitch + i % 8] = b[i];
  __syncwarp();
  uint32_t fragment_a[4];
  ldmatrix_x4(fragment_a, &tile_a[lane % 16 * kPitch + lane / 16 * 8]);
  uint32_t fragment_b[2];
  ldmatrix_x2(fragment_b, &tile_bt[lane % 8 * kPitch + lane % 16 / 8 * 8]);
  uint32_t fragment_trans[2];
  ldmatrix_x2_trans(fragment_trans, &tile_b[lane % 16 * kPitch]);
  float sums[4] = {1.0f, 1.0f, 1.0f, 1.0f};
  float sums_trans[4] = {1.0f, 1.0f, 1.0f, 1.0f};
  mma_m16n8k16<T>(sums, fragment_a, fragment_b);
  mma_m16n8k16<T>(sums_trans, fragment_a, fragment_trans);
  for (int i = 0; i < 4; ++i) {
    const int index = (lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2;
    c[index] = sums[i];
    c_trans[index] = sums_trans[i];
  }
}

float random_float() { return static_cast<float>(std::rand() % 2001 - 1000) / 256.0f; }

template <typename T>
void test_product(T (*from_float)(float), float (*to_float)(T)) {
  std::vector<T> a(256);
  std::vector<T> b(128);
  std::vector<T> b_transposed(128);
  for (T& element : a) element = from_float(random_float());
  for (int k = 0; k < 16; ++k) {
    for (int n = 0; n < 8; ++n) {
      b[k * 8 + n] = b_transposed[n * 16 + k] = from_float(random_float());
    }
  }
  std::vector<float> c(128);
  std::vector<float> c_trans(128);
  expect(run(product_kernel<T>, {1, 32}, a.data(), b_transposed.data(), b.data(), c.data(),
             c_trans.data()) == "",
         "the product kernel runs");
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 8; ++n) {
      float sum = 1.0f;
      for (int k = 0; k < 16; ++k) sum += to_float(a[m * 16 + k]) * to_float(b[k * 8 + n]);
      expect(c[m * 8 + n] == sum, "mma with b by ldmatrix_x2");
      expect(c_trans[m * 8 + n] == sum, "mma with b by ldmatrix_x2_trans");
    }
  }
}

__global__ void transpose_kernel(const uint16_t* in, uint32_t* out) {
  __shared__ __align__(16) uint16_t tile[32 * 8];
  for (int i = 0; i < 8; ++i) tile[threadIdx.x * 8 + i] = in[threadIdx.x * 8 + i];
  __syncwarp();
  uint32_t registers[4];
  ldmatrix_x4_trans(registers, &tile[threadIdx.x * 8]);
  for (int i = 0; i < 4; ++i) out[i * 32 + threadIdx.x] = registers[i];
}

void test_transpose() {
  std::vector<uint16_t> in(256);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<uint16_t>(i);
  std::vector<uint32_t> out(128);
  expect(run(transpose_kernel, {1, 32}, in.data(), out.data()) == "", "the transpose kernel runs");
  for (int tile = 0; tile < 4; ++tile) {
    for (int lane = 0; lane < 32; ++lane) {
      const int column = lane / 4;
      const int row = lane % 4 * 2;
      const uint32_t low = in[tile * 64 + row * 8 + column];
      const uint32_t high = in[tile * 64 + (row + 1) * 8 + column];
      expect(out[tile * 32 + lane] == (low | high << 16), "ldmatrix_x4_trans");
    }
  }
}

// ---- Warpgroup products

constexpr int kWideColumns = 128;

// scores[64][64] += a b^T and values[64][128] += a c, all of 16 products; b is [64][16], columns 16
// to 31 of rows of 64, c is [16][128], rows 16 to 31 of two tiles of 64 columns.
template <typename T>
__global__ void warpgroup_kernel(const T* a, const T* b, const T* c, float* scores, float* values) {
  SKV_DYNAMIC_SHARED(unsigned char, all_shared);
  unsigned char* shared = aligned_operands(all_shared);
  const auto place = [](int row, int column) {
    return column / 64 * 8192 + row * 128 + ((column % 64 / 8 ^ row % 8) * 16) + column % 8 * 2;
  };
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < 64 * 16; i += 128) {
    *reinterpret_cast<T*>(shared + place(i / 16, 16 + i % 16)) = b[i];
  }
  for (int i = thread; i < 16 * kWideColumns; i += 128) {
    *reinterpret_cast<T*>(shared + 8192 + place(16 + i / kWideColumns, i % kWideColumns)) = c[i];
  }
  fence_shared_for_products();
  __syncthreads();
  const int row = thread / 32 * 16 + thread % 32 / 4;
  const int column = 2 * (thread % 4);
  uint32_t fragment[4];
  for (int i = 0; i < 4; ++i) {
    std::memcpy(&fragment[i], &a[(row + i % 2 * 8) * 16 + column + i / 2 * 8], 4);
  }
  float narrow[32];
  float wide[kWideColumns / 2];
  for (float& sum : narrow) sum = 1.0f;
  for (float& sum : wide) sum = 1.0f;
  warpgroup_arrive();
  warpgroup_scores<T>(narrow, fragment, swizzled_operand(shared + 32, 0, kSwizzleAtomBytes));
  warpgroup_values<T>(wide, fragment,
                      swizzled_operand(shared + 8192 + 2048, 8192, kSwizzleAtomBytes));
  warpgroup_commit();
  warpgroup_wait<0>();
  const auto store = [&](float* result, const float* sums, int columns) {
    for (int i = 0; i < columns / 2; ++i) {
      result[(row + i / 2 % 2 * 8) * columns + i / 4 * 8 + column + i % 2] = sums[i];
    }
  };
  store(scores, narrow, 64);
  store(values, wide, kWideColumns);
}

template <typename T>
void test_warpgroup(T (*from_float)(float), float (*to_float)(T)) {
  std::vector<T> a(64 * 16);
  std::vector<T> b(64 * 16);
  std::vector<T> c(16 * kWideColumns);
  for (auto* matrix : {&a, &b, &c}) {
    for (T& element : *matrix) element = from_float(random_float());
  }
  std::vector<float> scores(64 * 64);
  std::vector<float> values(64 * kWideColumns);
  expect(run(warpgroup_kernel<T>, {1, 128, 4 * 8192}, a.data(), b.data(), c.data(), scores.data(),
             values.data()) == "",
         "the warpgroup kernel runs");
  for (int m = 0; m < 64; ++m) {
    for (int n = 0; n < kWideColumns; ++n) {
      float score = 1.0f;
      float value = 1.0f;
      for (int k = 0; k < 16; ++k) {
        const float left = to_float(a[m * 16 + k]);
        if (n < 64) score += left * to_float(b[n * 16 + k]);
        value += left * to_float(c[k * kWideColumns + n]);
      }
      if (n < 64) expect(scores[m * 64 + n] == score, "warpgroup product with b by rows");
      expect(values[m * kWideColumns + n] == value, "warpgroup product across rows");
    }
  }
}

// ---- Asynchronous copies

__global__ void copies_kernel(const int4* in, int4* out) {
  __shared__ int4 target[3];
  __shared__ int words[2];
  cp_async16(&target[0], &in[0], true);
  cp_async_commit();
  cp_async16(&target[1], &in[1], true);
  cp_async16(&target[2], &in[2], false);
  cp_async4(&words[0], &in[2].y, true);
  cp_async4(&words[1], &in[2].z, false);
  cp_async_commit();
  out[0] = target[0];  // too early
  cp_async_wait<1>();
  out[1] = target[0];
  out[2] = target[1];  // too early
  cp_async_wait<0>();
  out[3] = target[1];
  out[4] = target[2];
  out[5] = {words[0], words[1], 0, 0};
}

void test_copies() {
  const int4 in[3] = {{1, 2, 3, 4}, {5, 6, 7, 8}, {9, 9, 9, 9}};
  int4 out[6];
  expect(run(copies_kernel, {1, 1}, &in[0], &out[0]) == "", "the copy kernel runs");
  const char* mode = std::getenv("SKV_EMULATION_COPIES");
  const bool is_early = mode != nullptr && std::string(mode) == "early";
  expect((out[0].x == -1) != is_early, "a copy that was not waited for is not there yet");
  expect(out[1].x == 1 && out[1].w == 4, "wait<1> completes the older group");
  expect((out[2].x == -1) != is_early, "wait<1> leaves the younger group");
  expect(out[3].x == 5 && out[3].w == 8, "wait<0> completes all");
  expect(out[4].x == 0 && out[4].w == 0, "a copy that is not valid writes zeros");
  expect(out[5].x == 9 && out[5].y == 0, "copies of four bytes");
}

// ---- Warps and barriers

__global__ void shuffle_kernel(int* out) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  constexpr unsigned kAll = 0xffffffffu;
  const int results[] = {
      __shfl_sync(kAll, lane * 10, 5),
      __shfl_sync(kAll, lane * 10, lane + 1, 8),
      __shfl_up_sync(kAll, lane, 3),
      __shfl_down_sync(kAll, lane, 3, 16),
      __shfl_xor_sync(kAll, lane, 21),
      static_cast<int>(__shfl_xor_sync(kAll, lane * 0.5, 1) * 2),
      static_cast<int>(__ballot_sync(kAll, lane % 3 == 0)),
      __any_sync(kAll, lane == 7),
      __any_sync(kAll, 0),
      __all_sync(kAll, lane < 32),
      __all_sync(kAll, lane != 7),
      __syncthreads_or(threadIdx.x == 40),
      __syncthreads_or(0),
      __syncthreads_count(threadIdx.x % 2 == 0),
  };
  for (int i = 0; i < 14; ++i) out[threadIdx.x * 14 + i] = results[i];
}

void test_shuffles() {
  std::vector<int> out(48 * 14);
  expect(run(shuffle_kernel, {1, 48}, out.data()) == "", "the shuffle kernel runs");
  for (int thread = 0; thread < 32; ++thread) {  // the second warp is not full
    const int lane = thread % 32;
    const int expected[] = {50,
                            (lane / 8 * 8 + (lane + 1) % 8) * 10,
                            lane < 3 ? lane : lane - 3,
                            lane % 16 + 3 > 15 ? lane : lane + 3,
                            lane ^ 21,
                            lane ^ 1,
                            0x49249249,
                            1,
                            0,
                            1,
                            0,
                            1,
                            0,
                            24};
    expect(std::memcmp(expected, &out[thread * 14], sizeof expected) == 0, "warp operations");
  }
  expect(out[47 * 14 + 6] == (0x49249249 & 0xffff), "a ballot of a warp that is not full");
  expect(out[47 * 14 + 9] == 1, "all of a warp that is not full");
}

// Each thread reads what a thread of the other warp writes, with a barrier and without.
__global__ void exchange_kernel(float* out, bool has_barrier) {
  __shared__ float values[64];
  out[threadIdx.x] = values[threadIdx.x];
  values[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (has_barrier) __syncthreads();
  out[64 + threadIdx.x] = values[threadIdx.x ^ 32];
}

void test_exchange() {
  std::vector<float> out(128);
  const auto num_nan = [&](int begin) {
    int count = 0;
    for (int i = begin; i < begin + 64; ++i) count += std::isnan(out[i]) ? 1 : 0;
    return count;
  };
  for (int i = 0; i < 2; ++i) {  // also not what the block before left behind
    expect(run(exchange_kernel, {2, 64}, out.data(), true) == "", "the exchange kernel runs");
    expect(num_nan(0) == 64, "shared memory is poisoned");
    expect(num_nan(64) == 0 && out[64] == 32.0f, "a barrier orders writes and reads");
    run(exchange_kernel, {1, 64}, out.data(), false);
    expect(num_nan(64) > 0, "a missing barrier shows");
  }
}

// Inside a warp: lane i reads what lane i ^ 1 writes.
__global__ void warp_exchange_kernel(float* out, bool has_barrier) {
  __shared__ float values[32];
  values[threadIdx.x] = 1.0f;
  if (has_barrier) __syncwarp();
  out[threadIdx.x] = values[threadIdx.x ^ 1];
}

void test_warp_exchange() {
  for (bool has_barrier : {true, false}) {
    std::vector<float> out(32);
    run(warp_exchange_kernel, {1, 32}, out.data(), has_barrier);
    float sum = 0.0f;
    for (float value : out) sum += value;
    expect((sum == 32.0f) == has_barrier, "__syncwarp orders the lanes, and nothing else does");
  }
}

__global__ void ended_threads_kernel(int* out) {
  if (threadIdx.x >= 32) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void barrier_deadlock_kernel() {
  if (threadIdx.x < 40) {
    __syncthreads();
  } else {
    __syncwarp();
  }
}
__global__ void ended_lane_kernel(int* out) {
  if (threadIdx.x == 3) return;
  out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1, 1);
}
__global__ void divergent_kernel(int* out) {
  const unsigned all = 0xffffffffu;
  out[threadIdx.x] = threadIdx.x == 3 ? __any_sync(all, 1) : __shfl_xor_sync(all, 1, 1);
}
__global__ void half_mask_kernel(int* out) { out[threadIdx.x] = __shfl_xor_sync(0xffffu, 1, 1); }

void test_deadlocks() {
  std::vector<int> out(64);
  expect(run(ended_threads_kernel, {1, 64}, out.data()) == "" && out[31] == 1,
         "a barrier does not wait for threads that ended");
  expect_failure({"barrier_deadlock_kernel", "block 0", "deadlock", "40 threads at __syncthreads",
                  "24 threads at __syncwarp (first: thread 40)"},
                 barrier_deadlock_kernel, {2, 64});
  expect_failure({"deadlock", "31 threads at __shfl_xor_sync", "1 thread ended (first: thread 3)"},
                 ended_lane_kernel, {1, 32}, out.data());
  expect_failure({"divergent_kernel", "is at ", "of its warp is at "}, divergent_kernel, {1, 32},
                 out.data());
  expect_failure({"__shfl_xor_sync with mask 0x0000ffff"}, half_mask_kernel, {1, 32}, out.data());
}

// ---- Memory

__global__ void dynamic_kernel(int num_written) {
  SKV_DYNAMIC_SHARED(uint8_t, bytes);
  for (int i = 0; i < num_written; ++i) bytes[i] = 1;
}
__global__ void before_kernel() {
  SKV_DYNAMIC_SHARED(uint8_t, bytes);
  uint8_t* volatile before = bytes - 1;
  *before = 1;
}
__global__ void misaligned_kernel(const float* in, float4* out) {
  *out = *reinterpret_cast<const float4*>(in + 1);
}
__global__ void out_of_bounds_kernel(int index, int* out) {
  __shared__ int values[4];
  values[index] = 1;
  *out = values[0];
}
__global__ void copy_outside_kernel(const int4* in) {
  SKV_DYNAMIC_SHARED(int4, target);
  cp_async16(target + 4, in, true);
}
__global__ void assert_kernel(int value) { SKV_DEVICE_ASSERT(value >= 0); }
__global__ void atomics_kernel(unsigned* sum, int* largest) {
  atomicAdd(sum, threadIdx.x);
  atomicMax(largest, static_cast<int>(threadIdx.x));
}

void test_memory() {
  expect(run(dynamic_kernel, {3, 1, 100}, 100) == "", "all dynamic shared memory can be written");
  expect_failure({"dynamic_kernel", "wrote past its dynamic shared memory of 100 bytes"},
                 dynamic_kernel, {1, 1, 100}, 101);
  expect_failure({"wrote past"}, before_kernel, {1, 1, 100});
  expect(run(dynamic_kernel, {1, 1, 200 * 1024}, 200 * 1024) == "",
         "200 KB are there if asked for");
  expect_failure({"invalid argument"}, dynamic_kernel, {1, 1, 228 * 1024}, 0);
  expect_failure({"invalid configuration"}, dynamic_kernel, {1, 1025, 0}, 0);

  unsigned sum = 1;
  int largest = 5;
  alignas(16) float in[8] = {};
  float4 out;
  expect_failure({"self_test.cu", "misaligned address"}, misaligned_kernel, {1, 1}, &in[0], &out);
  expect_failure({"index 4 out of bounds of 'int [4]'"}, out_of_bounds_kernel, {1, 1}, 4, &largest);
  const int4 source{};
  expect_failure({"cp.async: the target is not shared memory"}, copy_outside_kernel, {1, 1, 64},
                 &source);
  expect_failure({"thread 0", "value >= 0"}, assert_kernel, {1, 1}, -1);

  expect(run(atomics_kernel, {2, 64}, &sum, &largest) == "", "the atomics kernel runs");
  expect(sum == 1 + 2 * 2016 && largest == 63, "atomics");
}

// ---- Arithmetic

void test_arithmetic() {
  expect(byte_perm(0x33221100u, 0x77665544u, 0x7350u) == 0x77335500u, "byte_perm");
  expect(__umul64hi(~0ull, ~0ull) == ~0ull - 1, "__umul64hi");
  expect(pack2<__half>(1.0f, -2.0f) == 0xC0003C00u, "pack2 of fp16");
  expect(pack2<__nv_bfloat16>(1.0f, -2.0f) == 0xC0003F80u, "pack2 of bf16");
  expect(pack2<__nv_bfloat16>(1.00390625f, 1.01171875f) == 0x3F823F80u, "rounding to even");
  expect(subtract2<__half>(0x64806401u, 0x64806480u) == 0x0000D7F0u, "subtract2 of fp16");
  expect(subtract2<__nv_bfloat16>(0x437F4301u, 0x43004380u) == 0x42FEC2FEu, "subtract2 of bf16");
  expect(exp2_approx(-INFINITY) == 0.0f && exp2_approx(0.0f) == 1.0f, "exact powers of two");
  expect(exp2_approx(-127.0f) == 0.0f && std::isnan(exp2_approx(NAN)), "exp2 flushes subnormals");
  expect(__float2int_rn(2.5f) == 2 && __float2int_rn(1e30f) == 2147483647, "__float2int_rn");
  expect(max(1.0f, NAN) == 1.0f && min(int64_t{3}, 5) == 3, "min and max");
}

}  // namespace
}  // namespace skv::cuda

int main() {
  using namespace skv::cuda;
  for (int i = 0; i < 5; ++i) {
    test_product<__nv_bfloat16>(__float2bfloat16_rn, __bfloat162float);
    test_product<__half>(__float2half_rn, __half2float);
    test_warpgroup<__nv_bfloat16>(__float2bfloat16_rn, __bfloat162float);
    test_warpgroup<__half>(__float2half_rn, __half2float);
  }
  test_transpose();
  test_copies();
  test_shuffles();
  test_exchange();
  test_warp_exchange();
  test_deadlocks();
  test_memory();
  test_arithmetic();
  std::printf("%s, %d failures\n", num_failures == 0 ? "passed" : "FAILED", num_failures);
  return num_failures < 100 ? num_failures : 100;
}
