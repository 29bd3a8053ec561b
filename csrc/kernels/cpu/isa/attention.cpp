// Paged attention for decode, verify and extend: one kernel, ragged queries.
//
// The contract (docs/correctness.md): a row's result depends on its query, its absolute position
// and the K/V it sees; on nothing else. So:
//  - the keys are cut into chunks of kChunk positions counted from position 0, whatever the batch;
//  - in a chunk, every score is one chain over d, the maximum is exact, the weights are summed by
//    lanes of position mod vector width, the output is one chain over ascending positions;
//  - chunk results are folded from left to right. A chunk without a visible key is left out.
// Threads and tiles only choose which chunk results are made where. With few rows and many keys
// the chunks of one row are spread over threads, kept, and folded afterwards in the same order.
//
// The query vectors of one KV head (rows x GQA group) share each load of K and V. Online softmax
// merge: Milakov & Gimelshein, arXiv 1805.02867; split over keys: Flash-Decoding.
#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "csrc/kernels/cpu/isa/attention_tile.h"
#include "csrc/kernels/cpu/isa/kernels.h"

namespace skv::cpu::SKV_ISA_NS {
namespace {

constexpr int64_t kMaxSplitItems = 16;  // with fewer tiles than this, threads share the chunks

void run_tile(const PagedAttentionParams& p, const Tile& tile) {
  const TileWork work(p, tile);
  float memory[2][kMaxStateFloats];
  const State state = State::in(memory[0], tile.count);
  const State next = State::in(memory[1], tile.count);
  TileWork::clear(state, tile.count);
  ReadAhead ahead = work.read_ahead(work.first_chunk(), work.end_chunk());
  for (int64_t chunk = work.first_chunk(); chunk < work.end_chunk(); ++chunk) {
    work.run_chunk(chunk, next, ahead);
    work.fold(state, next);
  }
  work.write_output(state);
}

// All tiles of the batch as a list that can be indexed without building it: per sequence, tiles
// outermost. Late tiles see more keys; taking them alternately from both ends gives every
// contiguous part of the list about the same work.
class TileList {
 public:
  explicit TileList(const PagedAttentionParams& p)
      : p_(p), group_(p.num_heads / p.layout.num_kv_heads) {
    for (int64_t s = 0; s < p.num_sequences; ++s) size_ += tiles_of(s) * p.layout.num_kv_heads;
  }

  int64_t size() const { return size_; }

  Tile at(int64_t index) const {
    int64_t sequence = 0;
    while (index >= tiles_of(sequence) * p_.layout.num_kv_heads) {
      index -= tiles_of(sequence) * p_.layout.num_kv_heads;
      ++sequence;
    }
    const int64_t tiles = tiles_of(sequence);
    const int64_t order = index / p_.layout.num_kv_heads;
    const int64_t tile = order % 2 == 0 ? order / 2 : tiles - 1 - order / 2;
    const int64_t first = tile * kMaxQueries;
    return {sequence, index % p_.layout.num_kv_heads, first,
            std::min(kMaxQueries, queries_of(sequence) - first)};
  }

 private:
  int64_t queries_of(int64_t sequence) const {
    return (p_.query_offsets[sequence + 1] - p_.query_offsets[sequence]) * group_;
  }
  int64_t tiles_of(int64_t sequence) const {
    return (queries_of(sequence) + kMaxQueries - 1) / kMaxQueries;
  }

  const PagedAttentionParams& p_;
  int64_t group_;
  int64_t size_ = 0;
};

// Few tiles, many chunks: every (tile, chunk) is a piece of work of its own. Returns false if the
// memory for the chunk results cannot be had; then nothing was done.
bool run_split(const PagedAttentionParams& p, const TileList& tiles, ParallelFor parallel_for) {
  int64_t first_piece[kMaxSplitItems + 1] = {0};
  int64_t first_chunk[kMaxSplitItems];
  int64_t largest = 0;
  for (int64_t i = 0; i < tiles.size(); ++i) {
    const Tile tile = tiles.at(i);
    const TileWork work(p, tile);
    largest = std::max(largest, tile.count);
    first_chunk[i] = work.first_chunk();
    first_piece[i + 1] = first_piece[i] + work.end_chunk() - work.first_chunk();
  }
  const int64_t num_pieces = first_piece[tiles.size()];
  const int64_t piece_floats = State::num_floats(largest, p.layout.head_dim);
  auto* memory = static_cast<float*>(
      std::malloc(static_cast<size_t>(num_pieces * piece_floats) * sizeof(float)));
  if (memory == nullptr) return false;
  parallel_for(num_pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = 0; i < tiles.size(); ++i) {
      const int64_t from = std::max(begin, first_piece[i]);
      const int64_t to = std::min(end, first_piece[i + 1]);
      if (from >= to) continue;
      const Tile tile = tiles.at(i);
      const TileWork work(p, tile);
      const int64_t shift = first_chunk[i] - first_piece[i];
      ReadAhead ahead = work.read_ahead(from + shift, to + shift);
      for (int64_t piece = from; piece < to; ++piece) {
        work.run_chunk(piece + shift, State::in(memory + piece * piece_floats, tile.count), ahead);
      }
    }
  });
  parallel_for(tiles.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Tile tile = tiles.at(i);
      const TileWork work(p, tile);
      float folded[kMaxStateFloats];
      const State state = State::in(folded, tile.count);
      TileWork::clear(state, tile.count);
      for (int64_t piece = first_piece[i]; piece < first_piece[i + 1]; ++piece) {
        work.fold(state, State::in(memory + piece * piece_floats, tile.count));
      }
      work.write_output(state);
    }
  });
  std::free(memory);
  return true;
}

// Rows behind those of the last sequence belong to none: they are defined as zero.
void clear_unowned_rows(const PagedAttentionParams& p) {
  const int64_t first = p.num_sequences > 0 ? p.query_offsets[p.num_sequences] : 0;
  const int64_t row_bytes = p.num_heads * p.layout.head_dim * element_size(p.activation_dtype);
  if (first == p.num_rows) return;  // the output may be empty, and null
  std::memset(static_cast<char*>(p.output) + first * row_bytes, 0,
              static_cast<size_t>((p.num_rows - first) * row_bytes));
}

}  // namespace

void paged_attention(const PagedAttentionParams& p, ParallelFor parallel_for) {
  clear_unowned_rows(p);
  const TileList tiles(p);
  if (tiles.size() == 0) return;
  int64_t longest = 0;
  for (int64_t s = 0; s < p.num_sequences; ++s) longest = std::max<int64_t>(longest, p.seq_lens[s]);
  if (tiles.size() <= kMaxSplitItems && longest > kChunk && run_split(p, tiles, parallel_for)) {
    return;
  }
  parallel_for(tiles.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) run_tile(p, tiles.at(i));
  });
}

}  // namespace skv::cpu::SKV_ISA_NS
