// Parameters of the kernels that write the KV pool, plain data for CPU and CUDA alike. Symbols:
// N new tokens, H query heads, Hk KV heads, D head dim, P pages, B page_size, C page copies.
#pragma once

#include <cstdint>

#include "csrc/kernels/kv_layout.h"
#include "csrc/kernels/params.h"

namespace skv {

struct AppendKvParams {
  const void* key;       // [N, Hk, D], source_dtype, D contiguous
  const void* value;     // [N, Hk, D], source_dtype, D contiguous
  const int64_t* slots;  // [N], page * B + offset; -1 = the row is skipped
  void* k_pool;          // [P, Hk, B, D], kv_dtype
  void* v_pool;          // [P, Hk, B, D], kv_dtype
  float* k_scales;       // [P, Hk, B] for int8, else null
  float* v_scales;       // [P, Hk, B] for int8, else null
  KvLayout layout;
  DType source_dtype;  // not int8
  DType kv_dtype;
  int64_t num_rows;           // N
  int64_t key_row_stride;     // elements between rows of key
  int64_t key_head_stride;    // elements between heads of key
  int64_t value_row_stride;   // elements between rows of value
  int64_t value_head_stride;  // elements between heads of value
};

struct RopeAppendKvParams {
  void* query;               // [N, H, D], activation dtype, D contiguous, rotated in place
  const void* key;           // [N, Hk, D], activation dtype, D contiguous
  const void* value;         // [N, Hk, D], activation dtype, D contiguous
  const int32_t* positions;  // [N], absolute positions, 0 <= position < num_positions
  const float* cos_sin;      // [num_positions, D], D/2 cosines then D/2 sines
  const int64_t* slots;      // [N], page * B + offset; -1 = nothing is written for the row
  void* k_pool;              // [P, Hk, B, D], kv_dtype, gets the rotated key
  void* v_pool;              // [P, Hk, B, D], kv_dtype
  float* k_scales;           // [P, Hk, B] for int8, else null
  float* v_scales;           // [P, Hk, B] for int8, else null
  KvLayout layout;
  DType activation_dtype;
  DType kv_dtype;
  int64_t num_rows;           // N
  int64_t num_heads;          // H
  int64_t query_row_stride;   // elements between rows of query
  int64_t query_head_stride;  // elements between heads of query
  int64_t key_row_stride;     // elements between rows of key
  int64_t key_head_stride;    // elements between heads of key
  int64_t value_row_stride;   // elements between rows of value
  int64_t value_head_stride;  // elements between heads of value
};

struct CopyPagesParams {
  const int32_t* page_copies;  // [C, 2], (from, to), taking effect in order
  void* k_pool;                // [num_layers, P, Hk, B, D]
  void* v_pool;                // [num_layers, P, Hk, B, D]
  void* k_scales;              // [num_layers, P, Hk, B], or null
  void* v_scales;              // [num_layers, P, Hk, B], or null
  int64_t num_copies;          // C
  int64_t num_layers;
  int64_t num_pages;    // P
  int64_t page_bytes;   // Hk * B * D * bytes per element
  int64_t scale_bytes;  // Hk * B * bytes per scale, of a page; 0 without scales
};

}  // namespace skv
