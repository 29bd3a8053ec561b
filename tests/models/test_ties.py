"""The list of known ties: what it accepts, and how it grows."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models.prompts import PROMPTS
from tests.models.ties import KNOWN, TIE, Tie, check_ties, read_ties

FOUND = Tie(prompt=3, position=17, gap=2e-4)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("SKV_UPDATE_TIES", raising=False)
    path = tmp_path / "ties.json"
    path.write_text('[{"prompt": 3, "position": 17, "gap": 0.00021}]')
    return path


def test_the_committed_list() -> None:
    for tie in read_ties(KNOWN):
        assert 0 <= tie.prompt < len(PROMPTS) and tie.position >= 0 and 0 <= tie.gap < TIE


def test_listed_ties_pass(path: Path) -> None:
    check_ties([], path)
    check_ties([FOUND], path)


@pytest.mark.parametrize("tie", [Tie(4, 17, 2e-4), Tie(3, 18, 2e-4), Tie(3, 17, 8e-4)])
def test_a_tie_elsewhere_fails(tie: Tie, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_text()
    with pytest.raises(AssertionError, match=rf"prompt={tie.prompt}, position={tie.position}"):
        check_ties([FOUND, tie], path)
    assert path.read_text() == before
    monkeypatch.setenv("SKV_UPDATE_TIES", "1")
    check_ties([FOUND, tie], path)
    assert tie in read_ties(path)
    assert len(read_ties(path)) == (1 if tie.position == 17 and tie.prompt == 3 else 2)
    monkeypatch.delenv("SKV_UPDATE_TIES")
    check_ties([tie], path)
