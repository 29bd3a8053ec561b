"""Files that the commands write: whole under their name, and never over what the run reads."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stateful_kv.apps import output
from stateful_kv.apps.cli import loading
from stateful_kv.apps.output import output_files
from stateful_kv.apps.profile.events import Event, TraceWriter
from stateful_kv.errors import InvalidRequestError, OutOfPagesError
from tests.cli.fake_engine import FakeEngine

OLD = "an older result"


@pytest.fixture
def workflow_path(tmp_path: Path, workflow_data: dict[str, Any]) -> Path:
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(workflow_data))
    return path


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


COMMANDS = {
    "run --json": (("run",), ("--json", "{out}")),
    "demo": (("demo", "--workflow"), ("--output", "{folder}")),
    "profile --json": (("profile",), ("--json", "{out}")),
    "profile --trace": (("profile",), ("--trace", "{out}")),
}


def _arguments(name: str, workflow: Path, out: Path) -> list[Any]:
    command, options = COMMANDS[name]
    filled = [option.format(out=out, folder=out.parent) for option in options]
    return [*command, workflow, *filled]


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("has_old", [False, True])
def test_a_failed_run_changes_no_file(
    engine: FakeEngine,
    invoke: Any,
    monkeypatch: pytest.MonkeyPatch,
    workflow_path: Path,
    tmp_path: Path,
    name: str,
    has_old: bool,
) -> None:
    def refuse(model: str, **unused: Any) -> None:
        raise OutOfPagesError(4, 0, 0, 2)

    monkeypatch.setattr(loading, "load_engine", refuse)
    folder = tmp_path / "out"
    folder.mkdir()
    out = folder / "report.json"
    if has_old:
        out.write_text(OLD)
    result = invoke(*_arguments(name, workflow_path, out))
    assert result.exit_code == 2, result.output
    assert _names(folder) == ({"report.json"} if has_old else set())
    if has_old:
        assert out.read_text() == OLD


@pytest.mark.parametrize("name", ["run --json", "demo"])
def test_a_full_disk_leaves_the_old_file(
    engine: FakeEngine,
    invoke: Any,
    monkeypatch: pytest.MonkeyPatch,
    workflow_path: Path,
    tmp_path: Path,
    name: str,
) -> None:
    def fail(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    out = tmp_path / "out" / "report.json"
    out.parent.mkdir()
    out.write_text(OLD)
    monkeypatch.setattr(output.os, "fsync", fail)
    result = invoke(*_arguments(name, workflow_path, out))
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert "No space left on device" in line
    assert out.read_text() == OLD
    assert _names(out.parent) == {"report.json"}


def test_a_full_device_is_one_line(engine: FakeEngine, invoke: Any, workflow_path: Path) -> None:
    result = invoke("run", workflow_path, "--json", "/dev/full")
    assert result.exit_code == 2
    assert "No space left on device" in result.stderr.splitlines()[-1]


def test_devices_and_pipes_are_written_to(
    engine: FakeEngine, invoke: Any, workflow_path: Path, tmp_path: Path
) -> None:
    assert invoke("run", workflow_path, "--json", "/dev/null").exit_code == 0
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert invoke("run", workflow_path, "--json", pipe).exit_code == 0
        assert b'"turns"' in os.read(reader, 1 << 16)
    finally:
        os.close(reader)


def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    plain, made, old = tmp_path / "plain", tmp_path / "made", tmp_path / "old"
    before = os.umask(0o027)
    try:
        plain.write_text("")
        old.write_text(OLD)
        old.chmod(0o604)
        with output_files(made, old) as files:
            for file in files:
                assert file is not None
                file.commit()
    finally:
        os.umask(before)
    assert stat.S_IMODE(made.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode) == 0o640
    assert stat.S_IMODE(old.stat().st_mode) == 0o604 and old.read_text() == ""


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    target, link, loose = tmp_path / "far" / "t", tmp_path / "link", tmp_path / "loose"
    target.write_text(OLD)
    link.symlink_to(target)
    loose.symlink_to(tmp_path / "far" / "new")
    with output_files(link, loose) as files:
        for file in files:
            assert file is not None
            file.file.write("new")
            file.commit()
    assert link.is_symlink() and loose.is_symlink()
    assert target.read_text() == (tmp_path / "far" / "new").read_text() == "new"
    assert _names(tmp_path / "far") == {"t", "new"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everything")
def test_a_read_only_file_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "old"
    path.write_text(OLD)
    path.chmod(0o400)
    with pytest.raises(PermissionError), output_files(path):
        pass


@pytest.mark.parametrize("way", ["same", "relative", "symlink", "hard link"])
@pytest.mark.parametrize("read", ["workflow", "model"])
def test_no_output_over_an_input(
    engine: FakeEngine,
    invoke: Any,
    monkeypatch: pytest.MonkeyPatch,
    workflow_path: Path,
    tmp_path: Path,
    way: str,
    read: str,
) -> None:
    model = tmp_path / "some.gguf"
    model.write_text("weights")
    source = workflow_path if read == "workflow" else model
    before = source.read_bytes()
    folder = tmp_path / "out"
    folder.mkdir()
    out = folder / "report.json"
    if way == "same":
        out = source
    elif way == "relative":
        monkeypatch.chdir(folder)
        out = Path("..") / "out" / ".." / source.name
    elif way == "symlink":
        out.symlink_to(source)
    else:
        os.link(source, out)
    for command, options in COMMANDS.values():
        if command[0] == "demo" and out.name != "report.json":
            continue
        filled = [option.format(out=out, folder=out.parent) for option in options]
        result = invoke(*command, workflow_path, *filled, "--model", model)
        assert result.exit_code == 2, result.output
        (line,) = result.stderr.splitlines()
        assert "another file for the output" in line and source.name in line
    assert source.read_bytes() == before
    assert engine.sessions == []


def test_no_output_over_a_file_of_a_model_folder(
    engine: FakeEngine, invoke: Any, workflow_path: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")
    options = ("--model", tmp_path, "--json")
    assert invoke("run", workflow_path, *options, tmp_path / "config.json").exit_code == 2
    for _ in range(2):
        assert invoke("run", workflow_path, *options, tmp_path / "out.json").exit_code == 0
    assert (tmp_path / "config.json").read_text() == "{}"


def test_two_outputs_in_one_file(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    second.symlink_to(first)
    twice = pytest.raises(InvalidRequestError, match="a file for each output")
    with twice, output_files(first, second):
        pass
    assert _names(tmp_path) == {"b"}


def test_what_cannot_be_renamed_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: str, target: str) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(output.os, "replace", fail)
    with pytest.raises(OSError, match="kept as"), output_files(tmp_path / "a") as (file,):
        assert file is not None
        file.file.write("minutes of work")
        file.commit()
    (kept,) = tmp_path.iterdir()
    assert kept.read_text() == "minutes of work"


def test_names_that_are_too_long_are_found_before_the_run(
    engine: FakeEngine, invoke: Any, workflow_path: Path, tmp_path: Path
) -> None:
    result = invoke("run", workflow_path, "--json", tmp_path / ("x" * 300))
    assert result.exit_code == 2 and "too long" in result.stderr
    assert engine.sessions == []
    # A name that is just short enough leaves room for no suffix; the temporary one is shorter.
    longest = tmp_path / ("x" * 255)
    assert invoke("run", workflow_path, "--json", longest).exit_code == 0
    assert longest.is_file()


def test_a_failed_profile_keeps_the_older_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text(OLD)
    with pytest.raises(KeyboardInterrupt), TraceWriter.open(path, "w") as trace:
        trace.add("turn 1: a", [Event("turn", 5.0, 2.0)])
        raise KeyboardInterrupt
    assert path.read_text() == OLD and _names(tmp_path) == {"trace.json"}


def test_standard_output_under_another_name(tmp_path: Path) -> None:
    """``--json /dev/stdout > file``: what was printed before must stay."""
    code = (
        "from pathlib import Path\n"
        "from stateful_kv.apps.output import output_files\n"
        "print('rows', flush=True)\n"
        "with output_files(Path('/dev/stdout')) as (file,):\n"
        "    file.file.write('json')\n"
        "    file.commit()\n"
    )
    with (tmp_path / "out").open("w") as file:
        subprocess.run([sys.executable, "-c", code], stdout=file, check=True)
    assert (tmp_path / "out").read_text() == "rows\njson"
