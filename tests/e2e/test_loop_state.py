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
def two_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few that sessions compete for them."""
    monkeypatch.setattr(TokenStore, "NUM_ROWS", 2)


class TestTokenStore:
    def test_sessions_keep_their_rows(self) -> None:
        store = TokenStore(9, CPU)
        assert store.num_rows == 0
        first, other = StoredTokens(), StoredTokens()
        store.place([first])
        row, first.length = first.row, 5
        store.place([other])
        store.place([other, first])
        assert (first.row, first.length) == (row, 5)
        assert {first.row, other.row} == {0, 1}
        assert store.spare_row == 2
        assert store.tokens.shape == (3, 9)

    def test_the_one_that_was_used_least_recently_gives_way(self) -> None:
        store = TokenStore(9, CPU)
        sessions = [StoredTokens() for _ in range(3)]
        store.place(sessions[:2])
        store.place([sessions[0]])
        for stored in sessions:
            stored.length = 7
        store.place([sessions[2]])
        assert [stored.length for stored in sessions] == [7, 0, 0]
        assert sessions[1].row == -1

    def test_more_sessions_than_rows(self) -> None:
        store = TokenStore(9, CPU)
        sessions = [StoredTokens() for _ in range(5)]
        store.place(sessions[:2])
        sessions[0].length = 3
        store.place(sessions)
        assert sorted(stored.row for stored in sessions) == [0, 1, 2, 3, 4]
        assert store.num_rows == 8
        assert sessions[0].length == 0, "the tokens are sent again"

    def test_random_use(self) -> None:
        store = TokenStore(4, CPU)
        sessions = [StoredTokens() for _ in range(9)]
        contents: dict[int, StoredTokens] = {}
        for _ in range(300):
            chosen = random.sample(sessions, random.randint(1, 4))
            store.place(chosen)
            assert len({stored.row for stored in chosen}) == len(chosen)
            for stored in sessions:
                assert stored.length == 0 or contents[stored.row] is stored, (
                    "another one wrote there"
                )
            for stored in chosen:
                assert 0 <= stored.row < store.num_rows
                contents[stored.row], stored.length = stored, random.randint(1, 4)

    @pytest.mark.parametrize("at", range(4))
    def test_an_interrupt_gives_no_row_to_two_sessions(
        self, monkeypatch: pytest.MonkeyPatch, at: int
    ) -> None:
        store = TokenStore(9, CPU)
        sessions = [StoredTokens() for _ in range(4)]
        store.place(sessions[:2])
        take, calls = StoredTokens.take, iter(range(100))

        def interrupted(self: StoredTokens, row: int) -> None:
            take(self, row)
            if next(calls) == at:
                raise KeyboardInterrupt

        monkeypatch.setattr(StoredTokens, "take", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.place(sessions[2:])
        monkeypatch.undo()
        monkeypatch.setattr(TokenStore, "NUM_ROWS", 2)
        for chosen in (sessions[1:3], sessions[2:], sessions[:2]):
            store.place(chosen)
            rows = [stored.row for stored in sessions if stored.row >= 0]
            assert sorted(rows) == [0, 1], "each row belongs to one session"
            assert all(stored.row >= 0 for stored in chosen)

    def test_what_still_belongs_to_the_ledger(self) -> None:
        ledger = Ledger(range(10))
        store = TokenStore(64, CPU)
        stored = store.of(ledger)
        assert stored is store.of(ledger)
        stored.length, stored.chosen = 10, np.array([10, 11, 12, 13], dtype=np.int32)
        ledger.append([10, 11, 99, 100])  # the reply ended behind 11, a message follows
        assert store.of(ledger).length == 12
        ledger.truncate(11)
        ledger.append([50, 51])
        assert store.of(ledger).length == 0, "what was dropped may be there still"
        assert store.of(ledger.copy()) is not stored


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
    state.ints.wanted["store_rows"].view(np.int64)[:, 0] = (2**40, -1, 5)
    state.ints.wanted["seeds"].view(np.uint64)[:, 0] = (2**64 - 1, 0, 2**63)
    state.ints.wanted["filters"].view(np.float32)[:] = [[0.5] * 3, [0.25] * 3, [1.5, 2.5, 3.5]]
    places, values = state.ints.changes()
    state.ints.buffer.index_copy_(0, torch.from_numpy(places), torch.from_numpy(values))
    assert state.progress.tolist() == list(range(1, 16))
    assert state.store_rows.tolist() == [2**40, -1, 5]
    assert state.seeds.tolist() == [-1, 0, -(2**63)]
    assert state.filters.tolist() == [[0.5] * 3, [0.25] * 3, [1.5, 2.5, 3.5]]
    assert state.trace.shape == (5, state.progress.shape[0])
