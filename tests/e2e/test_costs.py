"""Cost curves: their maths and their files."""

from __future__ import annotations

import json
import logging
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stateful_kv.drafts import cost_file
from stateful_kv.drafts.costs import CostCurve, point_rows, smoothed
from tests.e2e.tiny import COSTS

CURVE = CostCurve((1, 2, 4), (8.0, 9.0, 13.0), 0.25, 0.5, noise=0.1)


class TestCurve:
    def test_straight_between_points_and_behind_them(self) -> None:
        assert [CURVE.linear(rows) for rows in (1, 2, 3, 4, 5, 7)] == [8, 9, 11, 13, 15, 19]
        assert CostCurve((1,), (3.0,)).linear(3) == 9.0
        # Equal last points are noise, no reason to think that further rows are free.
        assert CostCurve((1, 3, 4), (1.0, 4.0, 4.0)).linear(5) == 5.0

    def test_attention_grows_with_rows_and_context(self) -> None:
        assert CURVE.attention(1, 100) == 75.0
        assert CURVE.attention(3, 100) == 175.0
        assert CURVE.total(2, 10) == 9.0 + 12.5
        assert replace(CURVE, window=10).attention(1, 100) == CURVE.attention(1, 10)

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("rows", ()),
            ("rows", (2, 3, 4)),
            ("rows", (1, 3, 3)),
            ("rows", (1, 2.5, 4)),
            ("rows", (1, 2, 10**9)),
            ("seconds", (1.0, 2.0)),
            ("seconds", (1.0, 3.0, 2.0)),
            ("seconds", (0.0, 1.0, 2.0)),
            ("seconds", (1.0, 2.0, float("nan"))),
            ("seconds", (1.0, 2.0, 10**400)),
            ("seconds", (1.0, 2.0, "3")),
            ("per_token", -1e-9),
            ("per_row_token", float("inf")),
            ("window", 0),
            ("noise", None),
        ],
    )
    def test_bad_fields_are_named(self, field: str, value: Any) -> None:
        with pytest.raises(ValueError, match=f"{field}: expected"):
            replace(CURVE, **{field: value})
        data = {**CURVE.to_json(), field: list(value) if isinstance(value, tuple) else value}
        with pytest.raises(ValueError, match=f"{field}: expected"):
            CostCurve.from_json(data)

    def test_json_and_back(self) -> None:
        curve = replace(CURVE, window=7)
        assert CostCurve.from_json(json.loads(json.dumps(curve.to_json()))) == curve

    @pytest.mark.parametrize("field", sorted(CURVE.to_json()))
    def test_missing_fields_are_named(self, field: str) -> None:
        data = CURVE.to_json()
        del data[field]
        with pytest.raises(ValueError, match=f"{field}: expected"):
            CostCurve.from_json(data)

    @pytest.mark.parametrize("data", [None, [], 3, {"format": "stateful-kv-cost-curve/2"}])
    def test_other_data_is_refused(self, data: Any) -> None:
        with pytest.raises(ValueError, match="expected"):
            CostCurve.from_json(data)

    def test_points(self) -> None:
        assert point_rows(1) == (1,)
        assert point_rows(2) == (1, 2)
        assert point_rows(8) == (1, 2, 3, 4, 6, 8)
        assert point_rows(17) == (1, 2, 3, 4, 6, 8, 12, 16, 17)

    def test_smoothing_keeps_order_and_sum(self) -> None:
        assert smoothed([1.0, 2.0, 3.0]) == (1.0, 2.0, 3.0)
        assert smoothed([1.0, 4.0, 2.0, 5.0]) == (1.0, 3.0, 3.0, 5.0)
        assert smoothed([3.0, 2.0, 1.0]) == (2.0, 2.0, 2.0)


KEY: cost_file.Key = {"cpu": "a", "threads": 2}


class TestFile:
    def test_store_and_load(self, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        assert cost_file.load(KEY) is None
        cost_file.store(KEY, CURVE)
        assert cost_file.load(KEY) == CURVE
        cost_file.store(KEY, COSTS)
        assert cost_file.load(KEY) == COSTS
        assert len(list(folder.iterdir())) == 1, "no temporary files stay"
        assert not caplog.records

    @pytest.mark.parametrize("other", [{"cpu": "b"}, {"threads": 3}, {"model": "m"}])
    def test_another_key_finds_nothing(self, folder: Path, other: dict[str, Any]) -> None:
        cost_file.store(KEY, CURVE)
        assert cost_file.load({**KEY, **other}) is None

    def test_a_file_under_the_wrong_name_is_not_believed(
        self, folder: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        cost_file.store(KEY, CURVE)
        other = {**KEY, "cpu": "b"}
        cost_file.store(other, COSTS)
        one, two = (cost_file._path(key) for key in (KEY, other))
        one.replace(two)
        assert cost_file.load(other) is None
        assert "key: expected" in caplog.text

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"{",
            b"\xff\xfe\x00",
            b"[" * 100_000,
            b"null",
            b'{"format": "stateful-kv-costs/0"}',
            b'{"format": "stateful-kv-costs/1", "key": {"cpu": "a", "threads": 2}}',
            b" " * ((1 << 20) + 1),
        ],
        ids=range(8),
    )
    def test_a_damaged_file_is_measured_anew(
        self, folder: Path, caplog: pytest.LogCaptureFixture, content: bytes
    ) -> None:
        cost_file.store(KEY, CURVE)
        path = next(folder.iterdir())
        path.write_bytes(content)
        assert cost_file.load(KEY) is None
        assert [record.levelno for record in caplog.records] == [logging.WARNING]
        cost_file.store(KEY, CURVE)
        assert cost_file.load(KEY) == CURVE

    def test_a_changed_value_is_refused(
        self, folder: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        cost_file.store(KEY, CURVE)
        path = next(folder.iterdir())
        path.write_text(path.read_text().replace("13.0", "-13.0"))
        assert cost_file.load(KEY) is None
        assert "seconds: expected" in caplog.text

    def test_a_folder_that_cannot_be_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        blocker = tmp_path / "file"
        blocker.write_text("")
        monkeypatch.setenv(cost_file.FOLDER_VARIABLE, str(blocker / "cache"))
        cost_file.store(KEY, CURVE)
        assert cost_file.load(KEY) is None
        assert list(cost_file.stored_here()) == []
        assert "not stored" in caplog.text

    def test_files_of_other_builds_are_removed(self, folder: Path) -> None:
        here: cost_file.Key = {
            "cpu": "a",
            "isa": "avx2",
            "cores": 2,
            "threads": 2,
            "library": "1",
            "model": "m",
        }
        outdated = [{**here, "library": "0"}, {**here, "library": "0", "model": "n"}]
        kept = [{**here, "model": "n"}] + [
            {**here, "library": "0", name: value}
            for name, value in (("cpu", "b"), ("isa", "avx512"), ("cores", 4), ("threads", 1))
        ]
        # Written once more at the end: storing one may have removed another.
        texts = {}
        for key in (*outdated, *kept):
            cost_file.store(key, CURVE)
            texts[cost_file._path(key)] = cost_file._path(key).read_text()
        for path, text in texts.items():
            path.write_text(text)
        others = {"costs-notes.json": "{}", "costs-old.txt": "x", "notes.json": text}
        for name, content in others.items():
            (folder / name).write_text(content)
        cost_file.store(here, COSTS)
        assert [cost_file.load(key) for key in outdated] == [None, None]
        assert [cost_file.load(key) for key in kept] == [CURVE] * len(kept)
        assert cost_file.load(here) == COSTS
        assert all((folder / name).read_text() == content for name, content in others.items())

    def test_a_failed_rename_leaves_nothing(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*args: object) -> None:
            raise OSError("disk full")

        monkeypatch.setattr(cost_file.os, "replace", fail)
        cost_file.store(KEY, CURVE)
        assert list(folder.iterdir()) == []

    def test_where_it_is(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv(cost_file.FOLDER_VARIABLE)
        shared, home = tmp_path / "shared", tmp_path / "home"
        monkeypatch.setenv("XDG_CACHE_HOME", str(shared))
        assert cost_file.folder() == shared / "stateful_kv"
        monkeypatch.setenv("HOME", str(home))
        for unusable in ("", "relative"):
            monkeypatch.setenv("XDG_CACHE_HOME", unusable)
            assert cost_file.folder() == home / ".cache" / "stateful_kv"

    def test_a_pipe_is_not_waited_for(self, folder: Path) -> None:
        cost_file.store(KEY, CURVE)
        (path,) = folder.iterdir()
        path.unlink()
        os.mkfifo(path)
        assert cost_file.load(KEY) is None
        assert list(cost_file.stored_here()) == []

    def test_many_writers(self, folder: Path) -> None:
        def write(curve: CostCurve) -> None:
            for _ in range(20):
                cost_file.store(KEY, curve)
                assert cost_file.load(KEY) in (CURVE, COSTS)

        threads = [threading.Thread(target=write, args=(curve,)) for curve in (CURVE, COSTS) * 2]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert cost_file.load(KEY) in (CURVE, COSTS)
        assert len(list(folder.iterdir())) == 1
