// Asks for a tile's keys and values a little before they are read.
//
// Attention of few rows is bound by memory, and the hardware's prefetchers start anew at every page
// tile. What makes a difference here is that requests are spread evenly: a burst waits for free
// line buffers, and arithmetic without requests leaves the memory idle. So every loop of the
// kernel, also the ones that work in the cache, takes steps of this walk over the memory to come.
// Lines go to the L2 cache; a request for L1 would hold its line buffer longer.
#pragma once

#include <algorithm>
#include <cstdint>

#include "csrc/kernels/cpu/isa/simd.h"
#include "csrc/kernels/kv_layout.h"
#include "csrc/kernels/params.h"

namespace skv::cpu::SKV_ISA_NS {

// The lines to ask for next: a run of them, then another. A copy lives in registers in the loops.
struct ReadAheadLines {
  uintptr_t at = 0;  // numbers, since the last line may end past the memory
  uintptr_t end = 0;
  uintptr_t next = 0;
  uintptr_t next_end = 0;

  SKV_INLINE void fetch_one() {
    if (at >= end) [[unlikely]] {
      at = next;
      end = next_end;
    }
    __builtin_prefetch(reinterpret_cast<const void*>(at), 0, 2);
    at += 64;
  }
};

class ReadAhead {
 public:
  // Positions [begin, end) of a KV head in the order the kernel takes them: the keys of a chunk,
  // its values, the next chunk. The first `lead` positions are left out: they are read at once.
  ReadAhead(const PagedAttentionParams& p, int64_t sequence, int64_t kv_head, int64_t element_size,
            int64_t chunk, int64_t begin, int64_t end, int64_t lead)
      : p_(p),
        pages_(p.page_table + sequence * p.page_table_row_stride),
        kv_head_(kv_head),
        element_size_(element_size),
        chunk_(chunk),
        end_(end),
        part_begin_(begin),
        part_end_(std::min(end, (begin / chunk + 1) * chunk)),
        position_(std::min(begin + lead, part_end_)) {}

  // To be called between loops; a loop may take the lines of about one page tile.
  SKV_INLINE ReadAheadLines& lines() {
    if (lines_.at >= lines_.end || lines_.end == lines_.next_end) find_runs();
    return lines_;
  }

 private:
  __attribute__((noinline)) void find_runs() {
    if (lines_.at >= lines_.end) {
      // The run after this one has been found, unless this is the first.
      if (lines_.end == lines_.next_end) find_next_run();
      lines_.at = lines_.next;
      lines_.end = lines_.next_end;
    }
    find_next_run();
  }

  // The next stretch of vectors that lie side by side; at the end, the page table over and over.
  void find_next_run() {
    if (position_ == part_end_ && part_begin_ < end_) {
      if (is_in_values_) {
        part_begin_ = part_end_;
        part_end_ = std::min(end_, part_begin_ + chunk_);
      }
      is_in_values_ = !is_in_values_;
      position_ = part_begin_;
    }
    if (position_ >= end_) {
      lines_.next = reinterpret_cast<uintptr_t>(pages_);
      lines_.next_end = lines_.next + 1;
      return;
    }
    const int64_t page_size = p_.layout.page_size;
    const int64_t run = std::min(page_size - position_ % page_size, part_end_ - position_);
    const int64_t first =
        p_.layout.vector_offset(pages_[position_ / page_size], kv_head_, position_ % page_size);
    lines_.next = reinterpret_cast<uintptr_t>(is_in_values_ ? p_.v_pool : p_.k_pool) +
                  static_cast<uintptr_t>(first * element_size_);
    lines_.next_end =
        lines_.next + static_cast<uintptr_t>(run * p_.layout.head_dim * element_size_);
    position_ += run;
  }

  const PagedAttentionParams& p_;
  const int32_t* pages_;
  const int64_t kv_head_;
  const int64_t element_size_;
  const int64_t chunk_;
  const int64_t end_;
  int64_t part_begin_;  // the keys or values of a chunk
  int64_t part_end_;
  int64_t position_;  // where the next run begins
  bool is_in_values_ = false;
  ReadAheadLines lines_;
};

// A loop's part in reading ahead: one byte for every `kDivisor` bytes the loop touches.
template <int64_t kDivisor>
class PacedReadAhead {
 public:
  explicit PacedReadAhead(ReadAhead& ahead) : ahead_(ahead) {}

  class Loop {
   public:
    explicit SKV_INLINE Loop(ReadAheadLines& lines) : home_(lines), lines_(lines) {}
    SKV_INLINE ~Loop() { home_ = lines_; }
    Loop(const Loop&) = delete;
    Loop& operator=(const Loop&) = delete;

    template <int64_t kBytes>
    SKV_INLINE void touch() {
      owed_ += kBytes / kDivisor;
#pragma GCC unroll 8
      for (int64_t i = 0; i < kBytes / kDivisor / 64; ++i) lines_.fetch_one();
      if constexpr (kBytes / kDivisor % 64 != 0) {
        if (owed_ % 64 == 0) lines_.fetch_one();
      }
    }

   private:
    ReadAheadLines& home_;
    ReadAheadLines lines_;
    int64_t owed_ = 0;
  };

  SKV_INLINE Loop begin() const { return Loop(ahead_.lines()); }

 private:
  ReadAhead& ahead_;
};

// No part in it: for many query vectors arithmetic takes longer than memory.
struct NoReadAhead {
  struct Loop {
    template <int64_t kBytes>
    SKV_INLINE void touch() {}
  };
  SKV_INLINE Loop begin() const { return {}; }
};

}  // namespace skv::cpu::SKV_ISA_NS
