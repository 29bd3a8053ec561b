// Which rows and keys a block works on: the list of all pieces of work, which no one writes down.
//
// Sequence s gives tiles(rows of s) x own runs pieces for each KV head; where a group of sequences
// shares a prefix, its first sequence also gives tiles(rows of the group) x prefix runs. Lengths
// are known on the device only, so every warp counts these numbers, 32 sequences at a time, until
// it has found the sequence of its piece.
//
//   keys of s   | run 0 | run 1 | run 2 | run 3 |
//                 read for the group| own runs        prefix_end = 2
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "csrc/kernels/cuda/attention_task.h"
#include "csrc/kernels/cuda/element.cuh"

namespace skv::cuda {

__device__ __forceinline__ int32_t group_size(const AttentionTask& task) {
  return static_cast<int32_t>(task.params.num_heads / task.params.layout.num_kv_heads);
}
__device__ __forceinline__ int32_t kv_heads(const AttentionTask& task) {
  return static_cast<int32_t>(task.params.layout.num_kv_heads);
}

// The last of entries [low, high) of ascending `offsets` that is at most `value`; low if none is.
__device__ __forceinline__ int32_t last_at_most(const int32_t* offsets, int32_t low, int32_t high,
                                                int32_t value) {
  while (high - low > 1) {
    const int32_t middle = low + (high - low) / 2;
    if (offsets[middle] <= value) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// First key that a row at `position` sees.
__device__ __forceinline__ int32_t first_visible(const AttentionTask& task, int32_t position) {
  const int64_t window = task.params.sliding_window;
  return window > 0 && position >= window ? static_cast<int32_t>(position - window + 1) : 0;
}

// What sequence s adds to the list, for one run length. Rows are rows of the batch, runs absolute.
struct SequenceWork {
  int32_t first_row;
  int32_t num_rows;
  int32_t first_position;
  int32_t own_begin;  // runs [own_begin, own_end) are read for its rows
  int32_t own_end;
  int32_t prefix_end;  // runs [0, prefix_end) are read for all rows of its group
  int32_t group_first_row;
  int32_t group_rows;  // 0 unless it is the first sequence of its group

  __device__ __forceinline__ int32_t own_runs() const { return own_end - own_begin; }
  // Its rows have one run: the output is written at once, without a partial result.
  __device__ __forceinline__ bool is_direct() const { return prefix_end == 0 && own_runs() <= 1; }
};

__device__ __forceinline__ SequenceWork sequence_work(const AttentionTask& task, int32_t sequence,
                                                      int32_t run_log2) {
  const PagedAttentionParams& params = task.params;
  const int32_t length = params.seq_lens[sequence];
  const int32_t end_row = params.query_offsets[sequence + 1];
  SequenceWork work{};
  work.first_row = params.query_offsets[sequence];
  work.num_rows = end_row - work.first_row;
  work.first_position = length - work.num_rows;
  const SharedPrefixes& prefixes = task.prefixes;
  // A run that holds all positions is never shared: with it nothing may need a partial result.
  if (prefixes.group_offsets != nullptr && run_log2 < task.plan.last_run_log2) {
    const int32_t group = last_at_most(prefixes.group_offsets, 0,
                                       static_cast<int32_t>(prefixes.num_groups), sequence);
    const int32_t first = prefixes.group_offsets[group];
    work.prefix_end = (prefixes.prefix_lens[group] / kChunkKeys) >> run_log2;
    if (first == sequence) {
      work.group_first_row = work.first_row;
      work.group_rows = params.query_offsets[prefixes.group_offsets[group + 1]] - work.first_row;
    }
  }
  if (work.num_rows == 0) return work;
  work.own_begin = (first_visible(task, max(work.first_position, 0)) / kChunkKeys) >> run_log2;
  work.own_begin = max(work.own_begin, work.prefix_end);
  // Rows without any key still are a piece of work: somebody has to write their zeros.
  const int32_t last_run = ((max(length, 1) - 1) / kChunkKeys) >> run_log2;
  work.own_end = max(last_run + 1, work.own_begin);
  return work;
}

// Numbers of one or several sequences.
struct WorkCount {
  int32_t items;         // pieces of work
  int64_t partial_rows;  // rows of partial results
};

__device__ __forceinline__ int32_t tiles_of(const AttentionTask& task, int32_t rows) {
  const int32_t tile_rows = task.plan.tile_rows;
  return (rows * group_size(task) + tile_rows - 1) / tile_rows;
}

__device__ __forceinline__ WorkCount count_work(const AttentionTask& task,
                                                const SequenceWork& work) {
  WorkCount count;
  count.items = kv_heads(task) * (tiles_of(task, work.num_rows) * work.own_runs() +
                                  tiles_of(task, work.group_rows) * work.prefix_end);
  count.partial_rows = 0;
  if (!work.is_direct()) {
    count.partial_rows =
        task.params.num_heads * (static_cast<int64_t>(work.num_rows) * work.own_runs() +
                                 static_cast<int64_t>(work.group_rows) * work.prefix_end);
  }
  return count;
}

__device__ __forceinline__ WorkCount count_sequence(const AttentionTask& task, int32_t sequence,
                                                    int32_t run_log2) {
  return count_work(task, sequence_work(task, sequence, run_log2));
}

// Of sequences [0, end); every lane returns the same.
__device__ __forceinline__ WorkCount count_sequences(const AttentionTask& task, int32_t end,
                                                     int32_t run_log2) {
  WorkCount count{0, 0};
  for (int32_t s = static_cast<int32_t>(threadIdx.x) % kWarpSize; s < end; s += kWarpSize) {
    const WorkCount one = count_sequence(task, s, run_log2);
    count.items += one.items;
    count.partial_rows += one.partial_rows;
  }
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
    count.items += __shfl_xor_sync(kFullWarp, count.items, mask);
    count.partial_rows += __shfl_xor_sync(kFullWarp, count.partial_rows, mask);
  }
  return count;
}

// The shortest runs within the plan's limits: long enough that partial results are few, short
// enough that all blocks have work. The longest always fit: then no row has a partial result.
__device__ __forceinline__ int32_t choose_run_log2(const AttentionTask& task) {
  const AttentionPlan& plan = task.plan;
  const int32_t num_sequences = static_cast<int32_t>(task.params.num_sequences);
  int32_t run_log2 = plan.first_run_log2;
  while (run_log2 < plan.last_run_log2) {
    const WorkCount total = count_sequences(task, num_sequences, run_log2);
    if (total.items <= plan.max_items && total.partial_rows <= plan.partial_rows) break;
    // Doubling the length at best halves the pieces: shorter runs than this cannot fit.
    const int32_t excess = static_cast<int32_t>((total.items - 1) / plan.max_items);
    run_log2 = min(plan.last_run_log2, run_log2 + max(1, 32 - __clz(excess)));
  }
  return run_log2;
}

// Where piece `item` of the list is. A block asks for ascending items; the cursor stays at the
// window of 32 sequences where the last one was. It lives in shared memory, so it has no
// constructor: start() comes first. For one warp.
class WorkCursor {
 public:
  __device__ __forceinline__ void start() {
    window_ = 0;
    before_ = {0, 0};
  }

  // False if the list is shorter. `item` becomes its number among the pieces of the sequence.
  __device__ __forceinline__ bool find(const AttentionTask& task, int32_t run_log2, int64_t item,
                                       int32_t* sequence, int32_t* item_of_sequence,
                                       int64_t* first_partial) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    const int32_t num_sequences = static_cast<int32_t>(task.params.num_sequences);
    while (window_ < num_sequences) {
      const int32_t window = window_;
      const WorkCount before = before_;
      WorkCount count{0, 0};
      if (window + lane < num_sequences) count = count_sequence(task, window + lane, run_log2);
      const WorkCount own = count;
      inclusive_scan(count, lane);
      const unsigned behind = __ballot_sync(kFullWarp, before.items + count.items > item);
      if (behind != 0) {
        const int found = __ffs(static_cast<int>(behind)) - 1;
        const int32_t items = __shfl_sync(kFullWarp, count.items - own.items, found);
        const int64_t rows = __shfl_sync(kFullWarp, count.partial_rows - own.partial_rows, found);
        *sequence = window + found;
        *item_of_sequence = static_cast<int32_t>(item - before.items - items);
        *first_partial = before.partial_rows + rows;
        return true;
      }
      __syncwarp();  // every lane has read both
      if (lane == kWarpSize - 1) {
        window_ = window + kWarpSize;
        before_ = {before.items + count.items, before.partial_rows + count.partial_rows};
      }
      __syncwarp();
    }
    return false;
  }

 private:
  static __device__ __forceinline__ void inclusive_scan(WorkCount& count, int lane) {
#pragma unroll
    for (int distance = 1; distance < kWarpSize; distance *= 2) {
      const int32_t items = __shfl_up_sync(kFullWarp, count.items, distance);
      const int64_t rows = __shfl_up_sync(kFullWarp, count.partial_rows, distance);
      if (lane >= distance) {
        count.items += items;
        count.partial_rows += rows;
      }
    }
  }

  int32_t window_;    // first of the 32 sequences
  WorkCount before_;  // of the sequences before them
};

// One piece of work. Packed rows: query row x heads of the KV head, counted from first_row.
struct TileWork {
  int32_t sequence;      // whose pages are read
  int32_t end_sequence;  // rows belong to sequences [sequence, end_sequence)
  int32_t kv_head;
  int32_t first_row;     // row of the batch of packed row 0
  int32_t first_packed;  // packed rows [first_packed, first_packed + num_packed)
  int32_t num_packed;
  int32_t key_begin;  // keys that some row sees, inside the run
  int32_t key_end;
  bool is_there;   // the list has this piece
  bool is_direct;  // its rows have no other piece: the output is written, not a partial result
  int64_t first_partial;  // row of the partial results of packed row first_packed

  // Position of a query row, relative to first_row.
  __device__ __forceinline__ int32_t position_of(const AttentionTask& task, int32_t row) const {
    const int32_t* offsets = task.params.query_offsets;
    const int32_t owner = last_at_most(offsets, sequence, end_sequence, first_row + row);
    return task.params.seq_lens[owner] - offsets[owner + 1] + first_row + row;
  }
};

// The rows and keys of one tile of `rows` query rows and one run. Late tiles see most keys and come
// first; neighbouring pieces read the same keys.
__device__ __forceinline__ void place_tile(const AttentionTask& task, int32_t rows, int32_t item,
                                           int32_t first_run, int32_t run_log2, TileWork* tile) {
  const int32_t tiles = tiles_of(task, rows);
  const int32_t tile_rows = task.plan.tile_rows;
  const int32_t packed_rows = rows * group_size(task);
  const int32_t row_tile = tiles - 1 - item % tiles;
  const int32_t slice = item / tiles;  // run x KV head
  tile->kv_head = slice % kv_heads(task);
  tile->first_packed = row_tile * tile_rows;
  tile->num_packed = min(tile_rows, packed_rows - tile->first_packed);
  tile->first_partial += static_cast<int64_t>(slice) * packed_rows + tile->first_packed;
  const int32_t run = first_run + slice / kv_heads(task);
  // In int64 while a run may end past the last position that is counted.
  const int64_t begin = (static_cast<int64_t>(run) << run_log2) * kChunkKeys;
  const int64_t end = begin + (static_cast<int64_t>(kChunkKeys) << run_log2);
  tile->key_begin = static_cast<int32_t>(begin);
  tile->key_end = static_cast<int32_t>(min(end, static_cast<int64_t>(INT32_MAX)));
}

// False if the list has no piece `item`. A piece may have no key; then it is empty.
__device__ __forceinline__ bool find_tile(const AttentionTask& task, int32_t run_log2, int64_t item,
                                          WorkCursor* cursor, TileWork* tile) {
  int32_t index = 0;
  if (!cursor->find(task, run_log2, item, &tile->sequence, &index, &tile->first_partial)) {
    return false;
  }
  const SequenceWork work = sequence_work(task, tile->sequence, run_log2);
  const int32_t own_items = kv_heads(task) * tiles_of(task, work.num_rows) * work.own_runs();
  tile->first_row = work.first_row;
  tile->end_sequence = tile->sequence + 1;
  tile->is_direct = work.is_direct();
  if (index < own_items) {
    place_tile(task, work.num_rows, index, work.own_begin, run_log2, tile);
    const int32_t group = group_size(task);
    const int32_t last_packed = tile->first_packed + tile->num_packed - 1;
    const int32_t last = work.first_position + last_packed / group;
    const int32_t first = work.first_position + tile->first_packed / group;
    tile->key_begin = max(tile->key_begin, first_visible(task, max(first, 0)));
    tile->key_end = min(tile->key_end, last + 1);
    return true;
  }
  // Every key of a shared run is in memory, and each row masks what it does not see.
  tile->first_partial +=
      task.params.num_heads * static_cast<int64_t>(work.num_rows) * work.own_runs();
  place_tile(task, work.group_rows, index - own_items, 0, run_log2, tile);
  tile->end_sequence = static_cast<int32_t>(task.params.num_sequences);
  return true;
}

}  // namespace skv::cuda
