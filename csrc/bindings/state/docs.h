// Docstrings of the state objects. Made by scripts/make_state_docs.py from
// python/stateful_kv/_state.pyi: edit that, then run the script.
#pragma once

#include <array>
#include <string_view>

namespace skv::bindings {

struct Doc {
  std::string_view name;
  const char* text;  // begins with the signature where Python takes it from there
};

// clang-format off
inline constexpr std::array kDocs{
    Doc{"PagePool", R"doc(Free list and reference counts of the pages of one KV pool. Knows no tokens and no bytes.

A page is free, or held with a count of at least 1. `allocate` gives pages with count 1,
`retain` adds one, `release` takes one; the last release makes the page free. Tables and trees
on the pool count their pages themselves. All calls are O(pages given).

Args:
    num_pages: P, pages of the pool, from 0 to 2^31 - 1.
    page_size: B, tokens a page holds, from 1 to 2^31 - 1.

Raises:
    ValueError: one of them is outside of its range.)doc"},
    Doc{"PagePool.__init__", R"doc(__init__(self, num_pages, page_size)
--

)doc"},
    Doc{"PagePool.allocate", R"doc(allocate(self, n)
--

Takes free pages.

Args:
    n: how many, at least 0.

Returns:
    int32[n], page ids with one reference each; None where fewer than n are free.)doc"},
    Doc{"PagePool.retain", R"doc(retain(self, pages)
--

Adds a reference for each entry.

Args:
    pages: int32[n], held pages; one may stand there more than once.

Raises:
    IndexError: no page of the pool.
    ValueError: a free page.)doc"},
    Doc{"PagePool.release", R"doc(release(self, pages)
--

Takes a reference for each entry; the last one makes a page free.

Args:
    pages: int32[n], held pages. Those that become free are given out again in this order.

Raises:
    IndexError: no page of the pool.
    ValueError: a page released more often than it was retained.)doc"},
    Doc{"PagePool.ref_count", R"doc(ref_count(self, page)
--

References of a page, 0 if it is free; IndexError if there is no such page.)doc"},
    Doc{"PagePool.num_free", R"doc(num_free(self)
--

Free pages.)doc"},
    Doc{"PagePool.num_pages", R"doc(num_pages(self)
--

P, all pages.)doc"},
    Doc{"PagePool.page_size", R"doc(page_size(self)
--

B, tokens a page holds.)doc"},
    Doc{"PagePool.check_integrity", R"doc(check_integrity(self)
--

The first violation found, or None. O(P).)doc"},
    Doc{"SequenceTable", R"doc(Page list and length of every sequence on a pool.

A step is: `reserve` (or `prepare_batch`), copy the pages it names, write keys and values into
the slots, `commit` what is to stay. A fork shares all pages of its parent; the first
reservation in a shared, partly filled page moves the writer to a fresh page, so no page with
two holders is ever written. The slot of token i is page_table[i // B] * B + i % B.

Ids are never reused. An id that was never given is an IndexError, a released one a ValueError,
in every call but `has`.

Args:
    pool: where the pages come from; kept alive. Sequences give their pages back when the table
        goes.)doc"},
    Doc{"SequenceTable.__init__", R"doc(__init__(self, pool)
--

)doc"},
    Doc{"SequenceTable.create", R"doc(create(self)
--

Makes an empty sequence and returns its id.)doc"},
    Doc{"SequenceTable.adopt", R"doc(adopt(self, pages, num_tokens)
--

Makes a sequence of tokens that have keys and values already, as `RadixTree.match` finds.

Args:
    pages: int32[ceil(num_tokens / B)], distinct held pages in order; retained.
    num_tokens: committed tokens of the new sequence.

Returns:
    Its id.

Raises:
    IndexError: no page of the pool.
    ValueError: a free page, a page twice, or not as many pages as the tokens need.)doc"},
    Doc{"SequenceTable.reserve", R"doc(reserve(self, seq, n)
--

Makes room for exactly n tokens behind the committed ones; an earlier reservation goes.

Args:
    seq: a sequence.
    n: how many tokens, at least 0.

Returns:
    int32[C, 2], page copies (from, to) to do before writing, C = 0 or 1: what
    `ops.copy_pages` takes. None where too few pages are free.)doc"},
    Doc{"SequenceTable.reserve_batch", R"doc(reserve_batch(self, sequence_ids, num_tokens)
--

`reserve` for each sequence in order, or for none of them.

Args:
    sequence_ids: int64[S], distinct sequences.
    num_tokens: int64[S], tokens of each.

Returns:
    int32[C, 2], page copies (from, to) to do before writing, 0 <= C <= S; None where too
    few pages are free.)doc"},
    Doc{"SequenceTable.pages_needed", R"doc(pages_needed(self, seq, n)
--

Free pages that `reserve` would take, the copy of a shared page included.)doc"},
    Doc{"SequenceTable.commit", R"doc(commit(self, seq, n)
--

Makes the first n reserved tokens part of the sequence and drops the rest.

Args:
    seq: a sequence.
    n: at most what is reserved, else ValueError.)doc"},
    Doc{"SequenceTable.commit_batch", R"doc(commit_batch(self, sequence_ids, num_tokens)
--

`commit` for each sequence; all are checked before one changes.

Args:
    sequence_ids: int64[S], distinct sequences.
    num_tokens: int64[S], tokens of each.)doc"},
    Doc{"SequenceTable.truncate", R"doc(truncate(self, seq, length)
--

Drops the reservation and all tokens from `length` on.

Args:
    seq: a sequence.
    length: from 0 to the committed length, else ValueError.)doc"},
    Doc{"SequenceTable.fork", R"doc(fork(self, seq)
--

Makes a sequence with the same tokens on the same pages; O(pages), copies no KV.

Args:
    seq: the parent; with a reservation it is a ValueError.

Returns:
    The id of the new sequence.)doc"},
    Doc{"SequenceTable.release", R"doc(release(self, seq)
--

Ends the sequence; pages that nobody else holds become free.)doc"},
    Doc{"SequenceTable.replace_prefix", R"doc(replace_prefix(self, seq, pages)
--

Swaps the first pages for pages of equal content, as `RadixTree.insert` returns them.

Args:
    seq: a sequence.
    pages: int32[n], held pages for its first n pages, which must be full and committed.)doc"},
    Doc{"SequenceTable.has", R"doc(has(self, seq)
--

Whether the sequence lives; False for one that was released or never made.)doc"},
    Doc{"SequenceTable.length", R"doc(length(self, seq)
--

Committed tokens.)doc"},
    Doc{"SequenceTable.lengths", R"doc(lengths(self, sequence_ids)
--

int64[S], the committed tokens of each sequence; one may stand in the list twice.)doc"},
    Doc{"SequenceTable.num_reserved", R"doc(num_reserved(self, seq)
--

Reserved tokens.)doc"},
    Doc{"SequenceTable.num_pages", R"doc(num_pages(self, seq)
--

Pages of the sequence, shared and reserved ones included.)doc"},
    Doc{"SequenceTable.page_table", R"doc(page_table(self, seq)
--

int32[num_pages], a copy of the page list.)doc"},
    Doc{"SequenceTable.fill_batch", R"doc(fill_batch(self, sequence_ids, query_lens)
--

What the ops take in a step over reserved rows.

Args:
    sequence_ids: int64[S], distinct sequences.
    query_lens: int32[S], new tokens of each, at most what is reserved.

Returns:
    page_table int32[S, M] (-1 past the pages in use), seq_lens int32[S] (committed +
    query_len), query_offsets int32[S + 1], positions int32[N] and slots int64[N], N being
    the sum of query_lens.)doc"},
    Doc{"SequenceTable.prepare_batch", R"doc(prepare_batch(self, sequence_ids, query_lens)
--

`reserve_batch` and then `fill_batch` for the reserved rows, in one call.

Args:
    sequence_ids: int64[S], distinct sequences.
    query_lens: int32[S], new tokens of each.

Returns:
    The page copies to do before writing, int32[C, 2] (from, to), and the five arrays of
    `fill_batch`; None where too few pages are free.)doc"},
    Doc{"SequenceTable.num_sequences", R"doc(num_sequences(self)
--

Living sequences.)doc"},
    Doc{"SequenceTable.sequence_ids", R"doc(sequence_ids(self)
--

Ids of the living sequences, ascending.)doc"},
    Doc{"SequenceTable.check_integrity", R"doc(check_integrity(self)
--

The first violation found, or None. O(all pages).)doc"},
    Doc{"Match", R"doc(The longest cached prefix of some tokens, as it was when `RadixTree.match` looked.)doc"},
    Doc{"Match.num_tokens", R"doc(Tokens of the prefix; 0 if nothing is cached.)doc"},
    Doc{"Match.pages", R"doc(int32[ceil(num_tokens / B)]. The tree's and not retained: adopt them before it evicts.)doc"},
    Doc{"InsertResult", R"doc(What `RadixTree.insert` found and made.)doc"},
    Doc{"InsertResult.num_matched", R"doc(Tokens that were there before.)doc"},
    Doc{"InsertResult.pages", R"doc(int32[ceil(T / B)], the pages that the tree now has for all the tokens.)doc"},
    Doc{"RadixTree", R"doc(Which token prefixes have keys and values in the pool, and on which pages.

A compressed tree whose borders may lie inside of pages. Nothing is shared between root keys:
take another one for each tenant, adapter or kind of KV. `match` and `insert` are O(tokens).

Args:
    pool: whose pages the tree holds; kept alive. They are released when the tree goes.)doc"},
    Doc{"RadixTree.__init__", R"doc(__init__(self, pool)
--

)doc"},
    Doc{"RadixTree.match", R"doc(match(self, root_key, tokens)
--

Finds the longest cached prefix; changes nothing.

Args:
    root_key: from 0 to 2^64 - 1.
    tokens: int32|int64[T], read in place; what is no token id never matches.)doc"},
    Doc{"RadixTree.touch", R"doc(touch(self, match)
--

Marks the path of a match as just used, so that it is evicted last.

Nothing happens if the path was evicted since; a match of another tree is a ValueError.)doc"},
    Doc{"RadixTree.insert", R"doc(insert(self, root_key, tokens, pages)
--

Makes tokens matchable, and their path the most recently used one. Idempotent.

Only the pages of new tokens are retained. A sequence may go on behind a partly filled last
page: it is shared now, so the next `reserve` moves the sequence to a copy.

Args:
    root_key: from 0 to 2^64 - 1.
    tokens: int32|int64[T], token ids.
    pages: int32[ceil(T / B)], distinct held pages with the KV of all the tokens.

Raises:
    IndexError: no page of the pool.
    ValueError: a free page, a page twice, not as many pages as the tokens need, or a value
        that is no token id.)doc"},
    Doc{"RadixTree.pin", R"doc(pin(self, root_key, tokens)
--

Protects the longest cached prefix of `tokens` from eviction; pins nest.

Args:
    root_key: from 0 to 2^64 - 1.
    tokens: int32|int64[T].

Returns:
    The pin, for `unpin`.)doc"},
    Doc{"RadixTree.pinned_length", R"doc(pinned_length(self, pin)
--

Tokens that a pin protects; errors as in `unpin`.)doc"},
    Doc{"RadixTree.unpin", R"doc(unpin(self, pin)
--

Ends a pin; IndexError for an unknown one, ValueError for one that was ended.)doc"},
    Doc{"RadixTree.evict", R"doc(evict(self, num_pages)
--

Drops least recently used pages until that many more are free, or no more can be.

Pages that are held outside of the tree, or pinned, stay.

Args:
    num_pages: how many, at least 0.

Returns:
    Pages that became free.)doc"},
    Doc{"RadixTree.evict_all", R"doc(evict_all(self)
--

`evict` as far as possible; returns the pages that became free.)doc"},
    Doc{"RadixTree.num_evictable_pages", R"doc(num_evictable_pages(self)
--

Pages that `evict_all` would free now. O(pages).)doc"},
    Doc{"RadixTree.num_blocked_pages", R"doc(num_blocked_pages(self, kept)
--

Pages that `evict_all` would leave to the tree alone if only `kept` were held outside.

They cover tokens before a kept page or a pin.

Args:
    kept: int32[n], pages of the pool, else IndexError.)doc"},
    Doc{"RadixTree.num_pinned_pages", R"doc(num_pinned_pages(self)
--

Distinct pages of pinned prefixes. O(pages).)doc"},
    Doc{"RadixTree.num_tree_pages", R"doc(num_tree_pages(self)
--

Distinct pages that the tree holds.)doc"},
    Doc{"RadixTree.num_nodes", R"doc(num_nodes(self)
--

Nodes that hold tokens.)doc"},
    Doc{"RadixTree.check_integrity", R"doc(check_integrity(self)
--

The first violation found, or None. O(tokens + pages).)doc"},
    Doc{"NgramIndex", R"doc(Where the last few tokens of a text occurred before, and what followed: a source of drafts.

Keeps the tokens itself. `append` and `truncate` cost O(max_n - min_n + 1) a token, `propose`
O(max_n + draft).

Args:
    min_n: shortest suffix that is looked up, at least 1.
    max_n: longest one, from min_n to 64.

Raises:
    ValueError: one of them is outside of its range.)doc"},
    Doc{"NgramIndex.__init__", R"doc(__init__(self, min_n=2, max_n=8)
--

)doc"},
    Doc{"NgramIndex.append", R"doc(append(self, tokens)
--

Adds tokens at the end of the text.

Args:
    tokens: int32|int64[T], token ids; a value that is none is a ValueError.)doc"},
    Doc{"NgramIndex.truncate", R"doc(truncate(self, length)
--

Drops the tokens from `length` on, which is from 0 to `size`, else ValueError.)doc"},
    Doc{"NgramIndex.size", R"doc(size(self)
--

Tokens of the text.)doc"},
    Doc{"NgramIndex.propose", R"doc(propose(self, max_tokens)
--

Drafts what may follow: what followed where the longest suffix last occurred before.

A text that repeats itself without end is continued so.

Args:
    max_tokens: the longest draft, at least 0.

Returns:
    The draft, int32[n] with n <= max_tokens, and the length of the suffix it was found by
    (0 = none, and no draft).)doc"},
    Doc{"NgramIndex.fork", R"doc(fork(self)
--

An independent index of the same text; O(1), copied when one of the two changes.)doc"},
    Doc{"NgramIndex.check_integrity", R"doc(check_integrity(self)
--

The first violation found, or None. O(size).)doc"},
    Doc{"propose_drafts", R"doc(propose_drafts(indexes, tokens, max_tokens)
--

Appends tokens[i] to indexes[i], then drafts up to max_tokens[i] tokens, for a whole batch.

All arguments are checked before any index changes.

Args:
    indexes: S distinct indexes.
    tokens: S arrays int32|int64[T], what is new in each text.
    max_tokens: int64[S], the longest draft of each; where it is 0 nothing is looked up.

Returns:
    draft_ids int32[sum of draft_lens], draft_lens int32[S] and match_lens int32[S], the length
    of the suffix each draft was found by (0 = none).)doc"},
    Doc{"check_references", R"doc(check_references(pool, table, trees)
--

Recounts all holders of all pages: the first difference from the pool's counts, or None.

Args:
    pool: whose counts.
    table: the pool's, else ValueError; None if it has none.
    trees: distinct trees of the pool, else ValueError.)doc"},
};
// clang-format on

// A name that has no docstring does not compile.
consteval const char* doc(std::string_view name) {
  for (const Doc& entry : kDocs) {
    if (entry.name == name) return entry.text;
  }
  throw "no docstring of this name";
}

}  // namespace skv::bindings
