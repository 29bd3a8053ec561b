"""Listing rows, filters by name and axis, and what a smoke run may not say or write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import __main__ as command
from bench import harness, report, selection, targets
from bench.selection import Row, Selection, SelectionError
from bench.suites import state

ROWS = [
    Row("decode", {"rows": 1, "context": 0}),
    Row("decode", {"rows": 1, "context": 2048}),
    Row("verify", {"rows": 4, "context": 2048}),
    Row("sample", {"R": 8, "p": 1.0}),
    Row("later_turn", {"workflow": "six"}, label="six"),
]


def _taken(chosen: Selection) -> list[int]:
    return [i for i, row in enumerate(ROWS) if chosen.takes(row.label or row.name, row.axes)]


def test_filters():
    assert _taken(Selection()) == [0, 1, 2, 3, 4]
    assert _taken(Selection("dec,ver")) == [0, 1, 2]
    assert _taken(Selection("six")) == [4]
    assert _taken(Selection(where={"rows": ("1", "8")})) == [0, 1]
    assert _taken(Selection(where={"rows": ("1", "4"), "context": ("2048",)})) == [1, 2]
    assert _taken(Selection(where={"p": ("1",)})) == [3]  # 1 is 1.0
    assert _taken(Selection(where={"workflow": ("six",)})) == [4]
    assert _taken(Selection("verify", {"context": ("2048",)})) == [2]


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (
            Selection(where={"row": ("1",)}),
            "--where: no axis row; there are rows, context, R, p, workflow",
        ),
        (Selection(where={"rows": ("1", "3")}), "--where: no row has rows=3; rows is 1, 4"),
        (Selection(where={"rows": ("many",)}), "--where: no row has rows=many; rows is 1, 4"),
        (
            Selection("prefill"),
            "--only: no row matches prefill; there are decode, verify, sample, six",
        ),
        (
            Selection("decode", {"rows": ("4",)}),
            "no row matches all filters together; axes of the rows left by --only: "
            "decode (2) rows=1 context=0,2048",
        ),
    ],
)
def test_a_filter_that_matches_nothing_names_what_there_is(chosen, message):
    with pytest.raises(SelectionError) as caught:
        chosen.check(ROWS)
    assert str(caught.value) == message


def test_filters_that_match_pass():
    Selection().check(ROWS)
    Selection("decode,nothing", {"rows": ("1",)}).check(ROWS)


def test_where_is_parsed():
    assert selection.parse_where("rows=1, 8") == ("rows", ("1", "8"))
    for text in ("rows", "rows=", "=1", "rows=1,,2"):
        with pytest.raises(ValueError, match="expected AXIS=VALUE"):
            selection.parse_where(text)


def test_lines_of_rows():
    assert list(selection.lines(ROWS)) == [
        "decode (2) rows=1 context=0,2048",
        "verify (1) rows=4 context=2048",
        "sample (1) R=8 p=1.0",
        "later_turn (1) workflow=six",
    ]


def test_list_shows_every_suite_and_runs_nothing(capsys, monkeypatch):
    monkeypatch.setattr(harness, "run_cases", lambda *_: pytest.fail("a case ran"))
    assert command.main(["run", "--list"]) == 0
    text = capsys.readouterr().out
    for suite in command.SUITES:
        assert f"\n{suite}: " in f"\n{text}"
    assert "  decode (3) rows=1 context=0,2048,6144" in text
    assert "  match (3) L=1000,10000,100000" in text
    assert command.main(["run", "state", "--list", "--where", "L=1000", "new=16"]) == 0
    assert capsys.readouterr().out == "state: 1 rows\n  ngram_append (1) L=1000 new=16\n"


def test_rows_that_are_listed_are_those_that_run(tmp_path):
    out = tmp_path / "a.json"
    arguments = ["state", "--smoke", "--only", "fork,append", "--out", str(out)]
    assert command.main(["run", *arguments, "--where", "L=1000"]) == 0
    chosen = Selection("fork,append", {"L": ("1000",)})
    listed = [
        (row.name, dict(row.axes))
        for row in state.rows(harness.Settings(smoke=True))
        if chosen.takes(row.name, row.axes)
    ]
    ran = [(r["name"], r["axes"]) for r in json.loads(out.read_text())["results"]]
    assert ran == listed and len(ran) == 3


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--where", "q=1"], "bench: --where: no axis q; there are L, new"),
        (["--where", "L=7"], "bench: --where: no row has L=7; L is 1000"),
        (["--only", "nothing"], "bench: --only: no row matches nothing; there are match, insert"),
    ],
)
def test_bad_filters_end_before_the_run(more, message, capsys, monkeypatch):
    monkeypatch.setattr(state, "run", lambda *_: pytest.fail("the suite ran"))
    assert command.main(["run", "state", "--smoke", *more]) == 2
    assert capsys.readouterr().err.startswith(message)


def test_a_suite_must_be_named(capsys):
    assert command.main(["run"]) == 2
    assert capsys.readouterr().err.startswith("bench: name a suite: ops, state, ")


def test_a_smoke_run_judges_nothing(tmp_path, capsys):
    out = tmp_path / "state.json"
    assert command.main(["run", "state", "--smoke", "--only", "match", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert text.splitlines() == [
        "match L=1000: ran, block_hash too, check holds",
        "smoke: nothing is judged",
    ]
    document = json.loads(out.read_text())
    (result,) = document["results"]
    assert not set(result) & set(harness.JUDGED)
    assert result["ours"]["samples"] and result["peer"]["samples"] and result["check"]["ok"]
    table = report.markdown(document)
    assert "smoke: nothing is judged" in table
    for word in ("FASTER", "SLOWER", "SAME", "UNCLEAR", "met", " us", "of bandwidth"):
        assert word not in table.partition("| case |")[2]
    assert command.main(["targets", str(out)]) == 0
    assert capsys.readouterr().out == "smoke: nothing is judged\n"
    assert targets.lines({**document, "smoke": False}) == []


def test_a_smoke_run_is_no_result(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(state, "run", lambda *_: pytest.fail("the suite ran"))
    folder = Path(command.__file__).parent / "results"
    link = tmp_path / "elsewhere"
    link.symlink_to(folder)
    for out in (folder / "smoke.json", link / "smoke.json"):
        assert command.main(["run", "state", "--smoke", "--out", str(out)]) == 2
        assert "a smoke run is no result; write it to another folder" in capsys.readouterr().err
        assert not out.exists()


def test_noise_is_the_distance_of_the_quartiles():
    assert harness.noise_percent([1.0]) is None
    assert harness.noise_percent([2.0] * 8) == 0.0
    assert harness.noise_percent([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(100 * 2 / 3)
    assert harness.statistics_of([1.0, 2.0, 3.0, 4.0, 5.0])["noise_percent"] == pytest.approx(
        200 / 3
    )


def test_noise_is_in_the_line_and_the_table():
    ratio = harness.ratio_of([1.0, 1.0, 1.0, 1.0], [2.0, 2.2, 2.0, 2.2])
    result = {
        "name": "c", "axes": {}, "peer_name": "p", "ours": harness.statistics_of([1.0] * 4),
        "ratio": ratio,
    }  # fmt: skip
    assert f"noise {ratio['noise_percent']:.1f} %" in report.line(result)
    # A file of an earlier version has the samples only.
    del ratio["noise_percent"]
    assert "noise 9.5 %" in report.line(result)
    del result["ratio"]
    assert "noise 0.0 %" in report.line(result)


def test_reports_of_earlier_results_still_work(tmp_path):
    results = Path(command.__file__).parent / "results"
    seen = 0
    for path in sorted(results.glob("cpu-*.json")):
        document = json.loads(path.read_text())
        if not str(document.get("schema", "")).startswith("stateful-kv-bench"):
            continue
        seen += 1
        table = report.markdown(report.load(path))
        assert table.count("\n| ") == len(document["results"]) + 1
        for result in document["results"]:
            share = report._fraction(result)
            if "%" in share:
                noise = harness.noise_percent(result["ours"]["samples"]) or 0.0
                assert float(share.partition("%")[0]) <= 100.5 + noise
    assert seen > 5
