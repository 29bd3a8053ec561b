"""What lives as long as a session: its tokens, and its keys and values while it has some."""

from __future__ import annotations

from dataclasses import dataclass

from stateful_kv.drafts.proposer import Drafter
from stateful_kv.errors import OutOfPagesError
from stateful_kv.kv.cache import KVCache
from stateful_kv.kv.roots import DEFAULT_ROOT, RootKey
from stateful_kv.session.ledger import Ledger
from stateful_kv.session.receipts import Reply


@dataclass(eq=False)
class SessionState:
    """The state of a session, worked on by the engine's owner alone.

    Its sequence may vanish between turns: the cache evicts sequences at rest. What is cut is cut
    in the order KV, drafter, ledger, so that an interrupt in between leaves less KV than tokens,
    which is always right: the next turn computes what is missing.

    Attributes:
        name: a label for people; nothing is looked up by it.
        ledger: every token of the session.
        cache: where KV lies.
        drafter: proposes tokens; None when drafting is off.
        root: with which sessions it may share KV.
        sequence_id: the session's sequence; None, or gone, while its KV is dropped.
        num_inserted: tokens of this sequence the prefix tree has been given.
        last_reply: of the last turn; None if that failed or still runs.
        is_busy: a turn runs.
        is_closed: no turn may start any more.
    """

    name: str
    ledger: Ledger
    cache: KVCache
    drafter: Drafter | None
    root: RootKey = DEFAULT_ROOT
    sequence_id: int | None = None
    num_inserted: int = 0
    last_reply: Reply | None = None
    is_busy: bool = False
    is_closed: bool = False

    @property
    def has_kv(self) -> bool:
        """Whether there is a sequence."""
        return self.sequence_id is not None and self.cache.has(self.sequence_id)

    @property
    def committed_len(self) -> int:
        """Tokens of the ledger that have KV."""
        sequence_id = self.sequence_id  # once: another thread may look at this at any time
        return 0 if sequence_id is None else self.cache.committed_len(sequence_id)

    def bind(self) -> None:
        """Makes sure there is a sequence: its own, or a new one on the longest cached prefix.

        The last token is never taken from the cache, since its logits are wanted. A hit that
        ends inside a page is cut to whole pages where there is no room for that page and the
        copy that the next token needs: a few tokens known must not be why a prompt does not fit.
        """
        if self.sequence_id is not None and self.cache.has(self.sequence_id):
            self.cache.wake(self.sequence_id)
            return
        self.num_inserted = 0
        tokens = self.ledger.tokens[:-1]
        self.sequence_id, length = self.cache.match_and_adopt(tokens, self.root)
        if length % self.cache.page_size:
            try:
                self.cache.check_room(self.sequence_id, len(self.ledger) - length)
            except OutOfPagesError:
                whole_pages = length - length % self.cache.page_size
                self.cache.truncate(self.sequence_id, whole_pages)

    def rest(self) -> None:
        """No turn needs the KV now: it may give way to that of others."""
        if self.sequence_id is not None:
            self.cache.rest(self.sequence_id)

    def insert(self, *, with_partial_page: bool = False) -> None:
        """Gives finished pages to the prefix tree; does nothing if it already has them."""
        if self.sequence_id is None:
            return
        length = self.committed_len
        if not with_partial_page:
            length -= length % self.cache.page_size
        if length > self.num_inserted:
            self.num_inserted = self.cache.insert(
                self.sequence_id, self.ledger.tokens, self.root, with_partial_page=with_partial_page
            )

    def insert_tail_copy(self) -> None:
        """Makes the tokens behind the last full page matchable too; costs a copy of one page."""
        if self.sequence_id is not None and self.has_kv:
            self.cache.insert_tail_copy(self.sequence_id, self.ledger.tokens, self.root)

    def drop_kv(self) -> None:
        """Releases the sequence; the ledger stays and the next turn rebuilds what it needs."""
        self.num_inserted = 0
        if self.sequence_id is not None:
            self.cache.release(self.sequence_id)
        self.sequence_id = None

    def truncate_kv(self, length: int) -> None:
        """Drops the KV of the tokens from `length` on, and every reservation."""
        if self.sequence_id is None or not self.has_kv:
            return
        length = min(length, self.committed_len)
        self.num_inserted = min(self.num_inserted, length)
        self.cache.truncate(self.sequence_id, length)

    def truncate(self, length: int) -> None:
        """Drops the tokens from `length` on, with their KV and every reservation."""
        if length == 0:
            self.drop_kv()
        else:
            self.truncate_kv(length)
        if self.drafter is not None:
            self.drafter.truncate(length)
        self.ledger.truncate(length)

    def repair(self) -> None:
        """After an interrupt: nothing may know more tokens than the ledger has."""
        length = len(self.ledger)
        self.ledger.truncate(length)
        if self.committed_len > length:
            self.truncate_kv(length)
        if self.drafter is not None:
            self.drafter.truncate(length)

    def check_integrity(self) -> str | None:
        """Describes the first broken invariant, or returns None."""
        if self.committed_len > len(self.ledger):
            return f"session {self.name!r}: KV of more tokens than its ledger has"
        problem = self.ledger.check_integrity()
        return None if problem is None else f"session {self.name!r}: {problem}"
