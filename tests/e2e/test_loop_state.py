"""What the device knows of sessions: rows of tokens, and numbers sent where they differ."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from stateful_kv.engine.loop.state import LoopShape, LoopState, MirroredInts
from stateful_kv.engine.loop.token_store import StoredTokens, TokenStore
from stateful_kv.session.ledger import Ledger

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def two_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few that sessions compete for them."""
    monkeypatch.setattr(TokenStore, "NUM_SLOTS", 2)


class TestTokenStore:
    def test_rows_keep_their_slots(self) -> None:
        store = TokenStore(9, CPU)
        assert store.num_slots == 0
        one, other = StoredTokens(), StoredTokens()
        store.place([one])
        slot, one.length = one.slot, 5
        store.place([other])
        store.place([other, one])
        assert (one.slot, one.length) == (slot, 5)
        assert {one.slot, other.slot} == {0, 1}
        assert store.spare_slot == 2
        assert store.tokens.shape == (3, 9)

    def test_the_one_that_was_used_least_recently_gives_way(self) -> None:
        store = TokenStore(9, CPU)
        rows = [StoredTokens() for _ in range(3)]
        store.place(rows[:2])
        store.place([rows[0]])
        for row in rows:
            row.length = 7
        store.place([rows[2]])
        assert [row.length for row in rows] == [7, 0, 0]
        assert rows[1].slot == -1

    def test_more_rows_than_slots(self) -> None:
        store = TokenStore(9, CPU)
        rows = [StoredTokens() for _ in range(5)]
        store.place(rows[:2])
        rows[0].length = 3
        store.place(rows)
        assert sorted(row.slot for row in rows) == [0, 1, 2, 3, 4]
        assert store.num_slots == 8
        assert rows[0].length == 0, "the tokens are sent again"

    def test_random_use(self) -> None:
        store = TokenStore(4, CPU)
        rows = [StoredTokens() for _ in range(9)]
        contents: dict[int, StoredTokens] = {}
        for _ in range(300):
            chosen = random.sample(rows, random.randint(1, 4))
            store.place(chosen)
            assert len({row.slot for row in chosen}) == len(chosen)
            for row in rows:
                assert row.length == 0 or contents[row.slot] is row, "another one wrote there"
            for row in chosen:
                assert 0 <= row.slot < store.num_slots
                contents[row.slot], row.length = row, random.randint(1, 4)

    def test_what_still_belongs_to_the_ledger(self) -> None:
        ledger = Ledger(range(10))
        store = TokenStore(64, CPU)
        row = store.row_of(ledger)
        assert row is store.row_of(ledger)
        row.length, row.chosen = 10, np.array([10, 11, 12, 13], dtype=np.int32)
        ledger.append([10, 11, 99, 100])  # the reply ended behind 11, a message follows
        assert store.row_of(ledger).length == 12
        ledger.truncate(11)
        ledger.append([50, 51])
        assert store.row_of(ledger).length == 0, "what was dropped may be there still"
        assert store.row_of(ledger.copy()) is not row


class TestMirroredInts:
    def send(self, ints: MirroredInts) -> int:
        places, values = ints.changes()
        ints.buffer.index_copy_(0, torch.from_numpy(places), torch.from_numpy(values))
        ints.confirm()
        return len(places)

    def test_only_differences_are_sent(self) -> None:
        ints = MirroredInts({"a": (3,), "b": (2, 2)}, CPU)
        assert self.send(ints) == 0
        ints.wanted["a"][1] = 7
        ints.wanted["b"][1] = (8, 9)
        assert self.send(ints) == 3
        assert self.send(ints) == 0
        assert ints.tensors["a"].tolist() == [0, 7, 0]
        assert ints.tensors["b"].tolist() == [[0, 0], [8, 9]]

    def test_what_the_device_writes_is_sent_whole(self) -> None:
        ints = MirroredInts({"a": (3,), "b": (2,)}, CPU)
        ints.wanted["a"][:] = 5
        self.send(ints)
        ints.tensors["a"].fill_(99)
        assert self.send(ints) == 0
        ints.forget("a")
        assert self.send(ints) == 3
        assert ints.tensors["a"].tolist() == [5, 5, 5]

    def test_what_did_not_arrive_is_sent_again(self) -> None:
        ints = MirroredInts({"a": (4,)}, CPU)
        ints.wanted["a"][2] = 3
        ints.changes()  # and then something went wrong
        ints.wanted["a"][2] = 0
        assert self.send(ints) == 1
        assert ints.tensors["a"].tolist() == [0, 0, 0, 0]


def test_the_parts_of_a_state_are_where_they_are_said_to_be() -> None:
    state = LoopState(LoopShape(3, 2, 4, True), 40, 5, CPU)
    assert state.history.shape == (3, 40)
    assert state.borders.tolist() == [0, 40, 80, 120]
    assert state.all_rows.tolist() == list(range(9))
    names = {"lengths": [1, 2, 3], "num_left": [4, 5, 6], "counts": range(7, 16)}
    for name, values in names.items():
        part = state.ints.wanted[name]
        part[:] = np.array(list(values)).reshape(part.shape)
    state.ints.wanted["slots"].view(np.int64)[:, 0] = (2**40, -1, 5)
    state.ints.wanted["seeds"].view(np.uint64)[:, 0] = (2**64 - 1, 0, 2**63)
    state.ints.wanted["filters"].view(np.float32)[:] = [[0.5] * 3, [0.25] * 3, [1.5, 2.5, 3.5]]
    places, values = state.ints.changes()
    state.ints.buffer.index_copy_(0, torch.from_numpy(places), torch.from_numpy(values))
    assert state.progress.tolist() == list(range(1, 16))
    assert state.slots.tolist() == [2**40, -1, 5]
    assert state.seeds.tolist() == [-1, 0, -(2**63)]
    assert state.filters.tolist() == [[0.5] * 3, [0.25] * 3, [1.5, 2.5, 3.5]]
    assert state.trace.shape == (5, state.progress.shape[0])
