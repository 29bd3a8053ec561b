// The only file with pool stride arithmetic, for host and device.
//
// One layer of a pool is [P, Hk, B, D]: the B x D tile of one KV head in one page is contiguous,
// so attention streams a head's keys without gaps and a GPU can fetch a tile in one bulk copy.
//   slot   = page * B + offset               (one token, all heads)
//   vector = ((page * Hk + head) * B + offset) * D
// The scales of int8 pools are [P, Hk, B]: one for each vector, in the same order.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define SKV_HOST_DEVICE __host__ __device__ __forceinline__
#else
// Always inline: kernels built for different instruction sets must not share one copy.
#define SKV_HOST_DEVICE __attribute__((always_inline)) inline
#endif

namespace skv {

struct KvLayout {
  int64_t num_pages;     // P
  int64_t num_kv_heads;  // Hk
  int64_t page_size;     // B
  int64_t head_dim;      // D

  // Elements from the start of the pool to the vector of `head` at `offset` in `page`.
  SKV_HOST_DEVICE int64_t vector_offset(int64_t page, int64_t head, int64_t offset) const {
    return ((page * num_kv_heads + head) * page_size + offset) * head_dim;
  }
  SKV_HOST_DEVICE int64_t slot_offset(int64_t slot, int64_t head) const {
    return vector_offset(slot / page_size, head, slot % page_size);
  }
  // Of the vector of `head` at `slot` among all vectors: where its scale is in [P, Hk, B].
  SKV_HOST_DEVICE int64_t scale_offset(int64_t slot, int64_t head) const {
    return (slot / page_size * num_kv_heads + head) * page_size + slot % page_size;
  }
  SKV_HOST_DEVICE int64_t page_vectors() const { return num_kv_heads * page_size; }
  SKV_HOST_DEVICE int64_t page_elements() const { return num_kv_heads * page_size * head_dim; }
  SKV_HOST_DEVICE int64_t num_slots() const { return num_pages * page_size; }
};

}  // namespace skv
