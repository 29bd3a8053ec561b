// Shadow of what CUDA threads do together: barriers, warp operations, atomics. cuda_runtime.h
// includes it.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "tests/emulation/runtime/emulator.h"

// ---- Barriers. Fences order nothing here: one thread runs at a time, and memory is the host's.

inline void __syncthreads() { skv::emulation::block_barrier("__syncthreads", 0); }
inline int __syncthreads_or(int value) {
  return skv::emulation::block_barrier("__syncthreads_or", value).count > 0;
}
inline int __syncthreads_and(int value) {
  const auto result = skv::emulation::block_barrier("__syncthreads_and", value);
  return result.count == result.arrived;
}
inline int __syncthreads_count(int value) {
  return skv::emulation::block_barrier("__syncthreads_count", value).count;
}
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  skv::emulation::warp_operation("__syncwarp", mask, nullptr, nullptr);
}
inline void __threadfence() {}
inline void __threadfence_block() {}

// ---- Shuffles

namespace skv::emulation {

template <typename T>
struct Shuffle {
  T value;
  int source;  // lane
  T result;
};

template <typename T>
void resolve_shuffle(void* const* arguments, uint32_t lanes) {
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if ((lanes >> lane & 1) == 0) continue;
    auto* mine = static_cast<Shuffle<T>*>(arguments[lane]);
    if ((lanes >> mine->source & 1) != 0) {
      mine->result = static_cast<const Shuffle<T>*>(arguments[mine->source])->value;
    } else {
      std::memset(static_cast<void*>(&mine->result), 0xff, sizeof(T));  // no such lane
    }
  }
}

template <typename T>
T shuffle(const char* name, unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= 8);
  Shuffle<T> argument{value, source, value};
  warp_operation(name, mask, &argument, resolve_shuffle<T>);
  return argument.result;
}

}  // namespace skv::emulation

// A segment of `width` lanes, a power of two, works like a warp of its own.
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int lane = skv::emulation::current_lane();
  const int from = (lane & ~(width - 1)) | (source & (width - 1));
  return skv::emulation::shuffle("__shfl_sync", mask, value, from);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = skv::emulation::current_lane();
  const int from = lane - static_cast<int>(delta);
  return skv::emulation::shuffle("__shfl_up_sync", mask, value,
                                 from < (lane & ~(width - 1)) ? lane : from);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = skv::emulation::current_lane();
  const int from = lane + static_cast<int>(delta);
  return skv::emulation::shuffle("__shfl_down_sync", mask, value,
                                 from > (lane | (width - 1)) ? lane : from);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  const int lane = skv::emulation::current_lane();
  const int from = lane ^ lane_mask;
  return skv::emulation::shuffle("__shfl_xor_sync", mask, value,
                                 from > (lane | (width - 1)) ? lane : from);
}

// ---- Votes

namespace skv::emulation {

struct Vote {
  bool predicate;
  uint32_t lanes;  // that exist
  uint32_t agreeing;
};

inline void resolve_vote(void* const* arguments, uint32_t lanes) {
  uint32_t agreeing = 0;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if ((lanes >> lane & 1) == 0) continue;
    if (static_cast<const Vote*>(arguments[lane])->predicate) agreeing |= uint32_t{1} << lane;
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if ((lanes >> lane & 1) == 0) continue;
    auto* vote = static_cast<Vote*>(arguments[lane]);
    vote->lanes = lanes;
    vote->agreeing = agreeing;
  }
}

inline Vote vote(const char* name, unsigned mask, int predicate) {
  Vote argument{predicate != 0, 0, 0};
  warp_operation(name, mask, &argument, resolve_vote);
  return argument;
}

}  // namespace skv::emulation

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return skv::emulation::vote("__ballot_sync", mask, predicate).agreeing;
}
inline int __any_sync(unsigned mask, int predicate) {
  return skv::emulation::vote("__any_sync", mask, predicate).agreeing != 0;
}
inline int __all_sync(unsigned mask, int predicate) {
  const auto result = skv::emulation::vote("__all_sync", mask, predicate);
  return result.agreeing == result.lanes;
}

// ---- Atomics of integers. Plain updates: a thread gives way only where it waits. Each returns the
// value before.

namespace skv::emulation {

template <typename T, typename Update>
T exchange_with(T* address, Update update) {
  static_assert(std::is_integral_v<T> && sizeof(T) >= 4, "no float atomics: their order varies");
  const T before = *address;
  *address = update(before);
  return before;
}

}  // namespace skv::emulation

template <typename T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  using Unsigned = std::make_unsigned_t<T>;
  return skv::emulation::exchange_with(address, [&](T before) {
    return static_cast<T>(static_cast<Unsigned>(before) + static_cast<Unsigned>(value));
  });
}
template <typename T>
T atomicSub(T* address, std::type_identity_t<T> value) {
  using Unsigned = std::make_unsigned_t<T>;
  return skv::emulation::exchange_with(address, [&](T before) {
    return static_cast<T>(static_cast<Unsigned>(before) - static_cast<Unsigned>(value));
  });
}
template <typename T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  return skv::emulation::exchange_with(address, [&](T b) { return b < value ? value : b; });
}
template <typename T>
T atomicMin(T* address, std::type_identity_t<T> value) {
  return skv::emulation::exchange_with(address, [&](T b) { return value < b ? value : b; });
}
template <typename T>
T atomicOr(T* address, std::type_identity_t<T> value) {
  return skv::emulation::exchange_with(address, [&](T b) { return b | value; });
}
template <typename T>
T atomicAnd(T* address, std::type_identity_t<T> value) {
  return skv::emulation::exchange_with(address, [&](T b) { return b & value; });
}
template <typename T>
T atomicExch(T* address, std::type_identity_t<T> value) {
  return skv::emulation::exchange_with(address, [&](T) { return value; });
}
template <typename T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return skv::emulation::exchange_with(
      address, [&](T before) { return before == expected ? value : before; });
}

// ---- Loads and stores with cache hints

template <typename T>
T __ldg(const T* address) {
  return *address;
}
template <typename T>
T __ldcg(const T* address) {
  return *address;
}
template <typename T>
T __ldcs(const T* address) {
  return *address;
}
template <typename T>
void __stcg(T* address, std::type_identity_t<T> value) {
  *address = value;
}
template <typename T>
void __stcs(T* address, std::type_identity_t<T> value) {
  *address = value;
}
