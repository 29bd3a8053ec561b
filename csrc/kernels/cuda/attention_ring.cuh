// Tiles of K and V on their way from the pages to shared memory.
//
// Tile t of a run makes the units 2t (its keys) and 2t + 1 (its values); a ring of kStages units
// keeps kStages - 1 of them in flight. Where a key lies is looked up from its page id, and the ids
// come through the same pipeline, kStages - 1 units before they are wanted:
//
//   unit         K0   V0   K1   V1   K2   V2        kStages = 3
//   brings ids   t1        t2        t3             those of t0 are loaded before
//
// Keys that no row of the tile sees are zero in shared memory and are never read: slots without a
// token may hold NaN.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "csrc/kernels/cuda/attention_work.cuh"
#include "csrc/kernels/cuda/ptx.cuh"
#include "csrc/kernels/cuda/wgmma.cuh"

namespace skv::cuda {

// Head dims whose tiles lie as warpgroup products want them (wgmma.cuh): 64 columns after the
// other.
template <int kHeadDim>
inline constexpr bool kIsColumnTiled = kHeadDim == 64 || kHeadDim == 128;
inline constexpr int kColumnTileBytes = kTileKeys * 128;

// A tile of kTileKeys rows of D 16-bit elements in 16-byte pieces, placed so that the eight rows of
// an 8x8 tile of ldmatrix (and 16 bytes of eight neighbouring rows) lie in different banks.
template <int kHeadDim>
__device__ __forceinline__ int tile_piece(int row, int piece) {
  static_assert(kHeadDim % 64 == 0 || kHeadDim == 96);
  if constexpr (kIsColumnTiled<kHeadDim>) {
    return piece / 8 * (kColumnTileBytes / 16) + row * 8 + (piece % 8 ^ (row & 7));
  }
  constexpr int kRowPieces = kHeadDim / 8;
  // Rows of 12 pieces are half a turn apart already: rows r and r + 2 have to be told apart.
  const int swizzle = kHeadDim == 96 ? (row >> 1) & 3 : row & 7;
  return row * kRowPieces + (piece ^ swizzle);
}

// Byte offsets of the pieces that a lane reads of a tile: of its row and piece, 16 * block rows
// below and 2 * step pieces further. Where rows are a power of two long a step is one XOR of the
// offset, cheap enough not to be kept in a register for each step.
template <int kHeadDim>
class LanePieces {
 public:
  // Precondition: begin, the offset of the tile, is a multiple of the bytes of a row.
  __device__ __forceinline__ LanePieces(int begin, int row, int piece)
      : begin_(begin), row_(row), piece_(piece) {
    if constexpr (kIsPowerOfTwo) begin_ += 16 * tile_piece<kHeadDim>(row, piece);
  }
  __device__ __forceinline__ int at(int block, int step) const {
    if constexpr (kIsColumnTiled<kHeadDim>) {
      return (begin_ ^ 32 * (step % 4)) + step / 4 * kColumnTileBytes + block * 16 * 128;
    }
    if constexpr (kIsPowerOfTwo) return (begin_ ^ 32 * step) + block * 32 * kHeadDim;
    return begin_ + 16 * tile_piece<kHeadDim>(row_ + 16 * block, piece_ + 2 * step);
  }

 private:
  static constexpr bool kIsPowerOfTwo = (kHeadDim & (kHeadDim - 1)) == 0;
  int begin_;
  int row_;
  int piece_;
};

// Layout of a block's dynamic shared memory; T is the type of the products, Kv that of the pools.
template <typename Kv, int kHeadDim>
struct RingShape {
  static constexpr bool kIsQuantized = sizeof(Kv) == 1;
  static constexpr bool kIsQueryShared = kHeadDim > 128;  // else it stays in registers
  static constexpr int kStages = kHeadDim <= 64 ? 4 : 3;
  static constexpr int kIdTiles = 4;  // tiles whose page ids are kept
  static constexpr int kVectorBytes = kHeadDim * static_cast<int>(sizeof(Kv));
  static constexpr int kVectorPieces = kVectorBytes / 16;
  static constexpr int kUnitBytes = kTileKeys * kVectorBytes;
  static constexpr int kWideBytes = kTileKeys * kHeadDim * 2;  // a unit in 16 bits an element

  static constexpr int kWideOffset = kStages * kUnitBytes;  // two converted units
  static constexpr int kScalesOffset = kWideOffset + (kIsQuantized ? 2 * kWideBytes : 0);
  static constexpr int kIdsOffset =
      kScalesOffset + (kIsQuantized ? kStages * kTileKeys * static_cast<int>(sizeof(float)) : 0);
  static constexpr int kIdsEnd =
      kIdsOffset + kIdTiles * kTileKeys * static_cast<int>(sizeof(int32_t));
  static constexpr int kQueryOffset = (kIdsEnd + 511) / 512 * 512;
  // Of the warps that share rows.
  static constexpr int kQueryBytes = kIsQueryShared ? kWarpRows * kHeadDim * 2 : 0;

  // Offset of what is behind the queries of so many warps.
  static constexpr SKV_HOST_DEVICE int end(int warps) {
    return kQueryOffset + warps / row_warps(kHeadDim) * kQueryBytes;
  }
};

// Two 16-bit elements of the two lowest bytes of `pair`, int8, as 16-bit numbers without rounding.
template <typename T>
__device__ __forceinline__ uint32_t widen_pair(uint32_t pair);

// Bytes v + 128 in the mantissa of 1024: 1024 + 128 + v, less 1152.
template <>
__device__ __forceinline__ uint32_t widen_pair<__half>(uint32_t pair) {
  const uint32_t biased = byte_perm(pair ^ 0x8080u, 0x64646464u, 0x4140u);
  return subtract2<__half>(biased, 0x64806480u);
}
// bfloat16 keeps seven bits: 128 + (v & 127), less 128 or, of negative v, 256.
template <>
__device__ __forceinline__ uint32_t widen_pair<__nv_bfloat16>(uint32_t pair) {
  const uint32_t spread = byte_perm(pair, 0, 0x4140u);
  return subtract2<__nv_bfloat16>(0x43004300u | (spread & 0x007f007fu),
                                  0x43004300u | (spread & 0x00800080u));
}

// kIsForWarpgroups: the tiles are operands of warpgroup products.
template <typename T, typename Kv, int kHeadDim, bool kIsForWarpgroups>
class KvRing {
 public:
  using Shape = RingShape<Kv, kHeadDim>;

  // `tile` is in shared memory.
  __device__ __forceinline__ KvRing(const AttentionTask& task, const TileWork& tile,
                                    unsigned char* shared)
      : task_(task), tile_(tile), shared_(shared) {}

  // Begins to load the keys of the tile, which has some. All threads of the block.
  __device__ __forceinline__ void start() {
    unit_ = 0;
    slot_ = 0;
    cp_async_wait<0>();
    __syncthreads();  // nobody reads the units or ids of the work before
#pragma unroll
    for (int index = 0; 2 * index < Shape::kStages - 1; ++index) load_ids(index);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
#pragma unroll
    for (int unit = 0; unit < Shape::kStages - 1; ++unit) issue(unit, unit);
  }

  // Waits for the next unit and returns where in shared memory it lies, as a tile of 16-bit
  // elements (see tile_piece). It stays until the next call. All threads of the block.
  __device__ __forceinline__ int next() {
    cp_async_wait<Shape::kStages - 2>();
    if constexpr (kIsForWarpgroups) fence_shared_for_products();
    __syncthreads();
    const int free_slot = slot_ == 0 ? Shape::kStages - 1 : slot_ - 1;
    issue(unit_ + Shape::kStages - 1, free_slot);
    int result = slot_ * Shape::kUnitBytes;
    if constexpr (Shape::kIsQuantized) {
      result = widen(result);
      if constexpr (kIsForWarpgroups) fence_shared_for_products();
      __syncthreads();
    }
    scales_slot_ = slot_;
    slot_ = slot_ + 1 == Shape::kStages ? 0 : slot_ + 1;
    ++unit_;
    return result;
  }

  // float[kTileKeys]: the scales of the unit that next() returned last; int8 pools only.
  __device__ __forceinline__ const float* scales() const { return unit_scales(scales_slot_); }

 private:
  __device__ __forceinline__ float* unit_scales(int slot) const {
    return reinterpret_cast<float*>(shared_ + Shape::kScalesOffset) + slot * kTileKeys;
  }
  __device__ __forceinline__ int32_t* tile_ids(int index) const {
    return reinterpret_cast<int32_t*>(shared_ + Shape::kIdsOffset) +
           index % Shape::kIdTiles * kTileKeys;
  }
  __device__ __forceinline__ bool is_visible(int32_t key) const {
    return key >= tile_.key_begin && key < tile_.key_end;
  }
  __device__ __forceinline__ int32_t first_tile() const { return tile_.key_begin / kTileKeys; }
  __device__ __forceinline__ int num_units() const {
    return 2 * ((tile_.key_end + kTileKeys - 1) / kTileKeys - first_tile());
  }
  __device__ __forceinline__ int32_t page_size() const {
    return static_cast<int32_t>(task_.params.layout.page_size);
  }

  // Page ids of the keys of the tile first_tile() + index.
  __device__ __forceinline__ void load_ids(int index) {
    const PagedAttentionParams& params = task_.params;
    const int32_t* pages = params.page_table + tile_.sequence * params.page_table_row_stride;
    int32_t* ids = tile_ids(index);
    for (int row = static_cast<int>(threadIdx.x); row < kTileKeys;
         row += static_cast<int>(blockDim.x)) {
      const int32_t key = (first_tile() + index) * kTileKeys + row;
      const bool visible = is_visible(key);
      // Powers of two are the usual sizes, and a division is a long sequence of instructions.
      const int32_t size = page_size();
      const int32_t page = (size & (size - 1)) == 0 ? key >> (__ffs(size) - 1) : key / size;
      cp_async4(ids + row, pages + (visible ? page : 0), visible);
    }
  }

  __device__ __forceinline__ int64_t vector_index(const int32_t* ids, int row, int32_t key) const {
    const int32_t size = page_size();
    const int32_t offset = (size & (size - 1)) == 0 ? key & (size - 1) : key % size;
    const int64_t tile = static_cast<int64_t>(ids[row]) * task_.params.layout.num_kv_heads;
    return (tile + tile_.kv_head) * size + offset;
  }

  // Starts the load of `unit` into `slot`, and of the page ids that are wanted after it. Always
  // ends a group, so that the waits can count.
  __device__ __forceinline__ void issue(int unit, int slot) {
    const int behind = unit + Shape::kStages - 1;
    if (behind % 2 == 0 && behind < num_units()) load_ids(behind / 2);
    if (unit < num_units()) {
      const PagedAttentionParams& params = task_.params;
      const bool is_value = unit % 2 != 0;
      const int32_t first_key = (first_tile() + unit / 2) * kTileKeys;
      const int32_t* ids = tile_ids(unit / 2);
      load_vectors(static_cast<const unsigned char*>(is_value ? params.v_pool : params.k_pool), ids,
                   first_key, shared_ + slot * Shape::kUnitBytes);
      if constexpr (Shape::kIsQuantized) {
        load_scales(is_value ? params.v_scales : params.k_scales, ids, first_key,
                    unit_scales(slot));
      }
    }
    cp_async_commit();
  }

  __device__ __forceinline__ void load_vectors(const unsigned char* pool, const int32_t* ids,
                                               int32_t first_key, unsigned char* unit) {
    constexpr int kPieces = Shape::kVectorPieces;
#pragma unroll 4
    for (int i = static_cast<int>(threadIdx.x); i < kTileKeys * kPieces;
         i += static_cast<int>(blockDim.x)) {
      const int row = i / kPieces;
      const int piece = i % kPieces;
      const int32_t key = first_key + row;
      // Bytes are read once, in order, to be converted: they need no swizzle.
      const int target = Shape::kIsQuantized ? i : tile_piece<kHeadDim>(row, piece);
      cp_async16(unit + target * 16,
                 pool + vector_index(ids, row, key) * Shape::kVectorBytes + piece * 16,
                 is_visible(key));
    }
  }

  __device__ __forceinline__ void load_scales(const float* scales, const int32_t* ids,
                                              int32_t first_key, float* unit) {
    for (int row = static_cast<int>(threadIdx.x); row < kTileKeys;
         row += static_cast<int>(blockDim.x)) {
      const int32_t key = first_key + row;
      cp_async4(unit + row, scales + vector_index(ids, row, key), is_visible(key));
    }
  }

  // Converts a unit of bytes once for all warps. Two targets take turns: the warps that are late
  // still read the unit before.
  __device__ __forceinline__ int widen(int unit) {
    const int wide = Shape::kWideOffset + unit_ % 2 * Shape::kWideBytes;
    constexpr int kPieces = Shape::kVectorPieces;
#pragma unroll 2
    for (int i = static_cast<int>(threadIdx.x); i < kTileKeys * kPieces;
         i += static_cast<int>(blockDim.x)) {
      const int row = i / kPieces;
      const int piece = i % kPieces;
      const uint4 bytes = *reinterpret_cast<const uint4*>(shared_ + unit + i * 16);
      unsigned char* target = shared_ + wide;
      auto* left = reinterpret_cast<uint4*>(target + tile_piece<kHeadDim>(row, 2 * piece) * 16);
      auto* right =
          reinterpret_cast<uint4*>(target + tile_piece<kHeadDim>(row, 2 * piece + 1) * 16);
      *left = make_uint4(widen_pair<T>(bytes.x), widen_pair<T>(bytes.x >> 16),
                         widen_pair<T>(bytes.y), widen_pair<T>(bytes.y >> 16));
      *right = make_uint4(widen_pair<T>(bytes.z), widen_pair<T>(bytes.z >> 16),
                          widen_pair<T>(bytes.w), widen_pair<T>(bytes.w >> 16));
    }
    return wide;
  }

  const AttentionTask& task_;
  const TileWork& tile_;
  unsigned char* shared_;
  int unit_;
  int slot_;
  int scales_slot_;
};

}  // namespace skv::cuda
