// Page list and length of every sequence.
//
//   tokens   0 ........ committed_len ........ allocated_len
//            | KV is written | reserved, being written |
//   pages    [0, ceil(allocated_len / page_size)), never more
//
// A step is: reserve -> write KV -> commit what is to stay. truncate() drops the tail.
// A fork shares all pages of its parent. The first reservation in a shared, partly filled page
// moves the writing sequence to a fresh page and returns the (from, to) pair that the caller must
// copy before it writes; the other holders never notice. So a page with two references is never
// written. Slot of a token: page_table[i / page_size] * page_size + i % page_size.
//
// Sequence ids are never reused. An id that was never given throws std::out_of_range, a released
// one std::invalid_argument; a call that throws or returns std::nullopt changed nothing.
// The pool must outlive the table. Spans into the table are valid until its next change.
// Not thread safe: the engine thread owns the table.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "csrc/core/ids.h"
#include "csrc/core/page_marks.h"
#include "csrc/core/page_pool.h"

namespace skv {

struct PageCopy {
  PageId from;
  PageId to;
};

// Sizes of the arrays that fill_batch() writes.
struct BatchShape {
  int64_t num_rows = 0;   // N: sum of query_lens
  int64_t max_pages = 0;  // M: pages of the longest sequence
};

// Destinations of fill_batch(), all owned by the caller, S = number of sequences.
struct BatchArrays {
  int32_t* page_table;     // [S, M], entries past ceil(seq_len / page_size) become -1
  int32_t* seq_lens;       // [S], committed_len + query_len
  int32_t* query_offsets;  // [S + 1]
  int32_t* positions;      // [N], absolute position of each new row
  int64_t* slots;          // [N], where its KV goes
};

class SequenceTable {
 public:
  explicit SequenceTable(PagePool& pool);
  ~SequenceTable();  // releases every sequence
  SequenceTable(const SequenceTable&) = delete;
  SequenceTable& operator=(const SequenceTable&) = delete;

  // An empty sequence. O(1).
  SequenceId create();

  // A sequence that already holds num_tokens committed tokens on `pages`, which must be held,
  // distinct and exactly ceil(num_tokens / page_size). Retains them. O(pages).
  SequenceId adopt(std::span<const PageId> pages, int64_t num_tokens);

  // Makes the reservation after committed_len exactly n slots (a former one is replaced). Returns
  // the copies to do (none or one), or std::nullopt when the pool has too few free pages.
  // O(pages gained or dropped).
  std::optional<std::vector<PageCopy>> reserve(SequenceId seq, int64_t n);

  // Fresh pages, copy-on-write included, that reserve(seq, n) would take from the pool. O(1).
  int64_t pages_needed(SequenceId seq, int64_t n) const;

  // The first n reserved tokens become part of the sequence, the rest of the reservation and its
  // pages are dropped. 0 <= n <= reserved.
  void commit(SequenceId seq, int64_t n);

  // Does for each of the distinct sequences what reserve(seqs[i], num_tokens[i]) would do, in that
  // order, and returns all the copies in that order; at most one for a sequence. Or std::nullopt,
  // with nothing changed, if one of those calls would find too few free pages. So of sequences that
  // share a partly filled page, each but the last holder gets a copy.
  // O(S + pages gained or dropped).
  std::optional<std::vector<PageCopy>> reserve_batch(std::span<const SequenceId> seqs,
                                                     std::span<const int64_t> num_tokens);

  // commit(seqs[i], num_tokens[i]) for each of the distinct sequences; all are checked before one
  // is changed. O(S + pages dropped).
  void commit_batch(std::span<const SequenceId> seqs, std::span<const int64_t> num_tokens);

  // Drops the reservation and all tokens from `length` on. 0 <= length <= committed_len.
  void truncate(SequenceId seq, int64_t length);

  // A new sequence with the same tokens and pages. The parent must have no reservation: its writes
  // would land in a page that it shares. O(pages), copies no KV.
  SequenceId fork(SequenceId seq);

  // Drops the sequence and its references. O(pages).
  void release(SequenceId seq);

  // Swaps the first pages.size() pages, which must be full and committed, for pages of equal
  // content. Retains the new ones, releases the old ones. O(pages of the sequence).
  void replace_prefix(SequenceId seq, std::span<const PageId> pages);

  // Whether the sequence was created and not released; any integer may be asked for.
  bool has(SequenceId seq) const { return sequences_.contains(seq); }
  int64_t length(SequenceId seq) const { return find(seq).committed_len; }
  int64_t num_reserved(SequenceId seq) const {
    const Sequence& sequence = find(seq);
    return sequence.allocated_len - sequence.committed_len;
  }
  int64_t num_pages(SequenceId seq) const { return static_cast<int64_t>(find(seq).pages().size()); }
  std::span<const PageId> page_table(SequenceId seq) const { return find(seq).pages(); }
  // Ids of all sequences that were not released, ascending.
  std::vector<SequenceId> sequence_ids() const;
  int64_t num_sequences() const { return static_cast<int64_t>(sequences_.size()); }

  // Checks a batch (distinct sequences, 0 <= query_len <= reserved) and returns its shape. O(S).
  BatchShape plan_batch(std::span<const SequenceId> seqs,
                        std::span<const int32_t> query_lens) const;

  // The shape that plan_batch() will return after reserve_batch() with these lengths; std::nullopt
  // if reserve_batch() would return that. So a caller can allocate the arrays before anything
  // changes. Throws what reserve_batch() would. O(S + pages dropped).
  std::optional<BatchShape> plan_reserve(std::span<const SequenceId> seqs,
                                         std::span<const int32_t> query_lens) const;

  // Writes the arrays of a batch that plan_batch() accepted. O(S * M + N).
  void fill_batch(std::span<const SequenceId> seqs, std::span<const int32_t> query_lens,
                  const BatchShape& shape, const BatchArrays& out) const;

  // Describes the first violation found. O(all pages).
  std::optional<std::string> check_integrity() const;

  // Adds one to counts[page] for every sequence that holds it; counts has num_pages entries.
  void count_references(std::span<int64_t> counts) const;

 private:
  friend class SequenceTableTestPeer;

  struct Sequence {
    // Shared with forks until one of them changes its list: copying it (12 KiB of fresh memory for
    // 3000 pages) would be the greater part of a fork.
    std::shared_ptr<std::vector<PageId>> shared_pages = std::make_shared<std::vector<PageId>>();
    int64_t committed_len = 0;
    int64_t allocated_len = 0;

    const std::vector<PageId>& pages() const { return *shared_pages; }
    std::vector<PageId>& own_pages() {
      if (shared_pages.use_count() > 1) {
        shared_pages = std::make_shared<std::vector<PageId>>(*shared_pages);
      }
      return *shared_pages;
    }
  };

  const Sequence& find(SequenceId seq) const;
  Sequence& find(SequenceId seq) {
    return const_cast<Sequence&>(static_cast<const SequenceTable*>(this)->find(seq));
  }
  SequenceId add(Sequence sequence);
  static void require_batch(const char* what, std::span<const SequenceId> seqs, size_t num_values);
  bool writes_shared_page(const Sequence& sequence, int64_t n) const;
  template <typename Count>
  bool can_reserve(std::span<const SequenceId> seqs, std::span<const Count> num_tokens) const;
  BatchShape shape_of(std::span<const SequenceId> seqs, std::span<const int32_t> query_lens) const;
  const Sequence& require_reserved(const char* what, SequenceId seq, int64_t n) const;
  void drop_tail(Sequence& sequence, int64_t new_len);
  int64_t pages_for(int64_t num_tokens) const;

  PagePool& pool_;
  SequenceId next_id_ = 0;
  std::unordered_map<SequenceId, Sequence> sequences_;
  PageMarks marks_;
};

}  // namespace skv
