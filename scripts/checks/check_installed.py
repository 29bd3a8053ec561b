#!/usr/bin/env python3
"""Run by the interpreter of an environment with stateful_kv: is what was installed whole?

check_installed.py [--at FOLDER] [--without-engine]

    --at              the folder that the package is expected in, else site-packages
    --without-engine  the packages of the extra `engine` are not there: the ops work, and the engine
                      says what to install
"""

import argparse
import sysconfig
from importlib.metadata import distribution
from pathlib import Path

import torch

import stateful_kv
from stateful_kv import ops


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--at", type=Path, default=Path(sysconfig.get_path("purelib")))
    parser.add_argument("--without-engine", action="store_true")
    options = parser.parse_args()

    package = Path(stateful_kv.__file__).resolve().parent
    expected = options.at.resolve() / "stateful_kv"
    assert package == expected, f"imported {package}, expected {expected}"
    assert list(package.glob("_C.*.so")), "the extension is missing"
    assert (package / "libstateful_kv_ops.so").is_file(), "the library of the ops is missing"
    assert list(package.glob("data/*.json")), "the workflows of the demo are missing"
    assert (package / "py.typed").is_file(), "py.typed is missing"

    installed = distribution("stateful-kv")
    names = {file.parts[0] for file in installed.files or []}
    outside = names & {"tests", "bench", "csrc", "scripts", "docs", "examples", "cmake"}
    assert not outside, f"{outside} are installed at top level"
    assert any(file.name == "LICENSE" for file in installed.files or []), "LICENSE is missing"
    version, minor = stateful_kv.__version__, ".".join(torch.__version__.split(".")[:2])
    assert installed.version.split("+")[0] == version, (installed.version, version)
    info = stateful_kv.build_info()
    assert info["version"] == version, (info, version)
    torch_line = [line for line in installed.requires or [] if line.startswith("torch")]
    assert torch_line == [f"torch=={minor}.*"], torch_line

    result = ops.silu_mul(torch.tensor([[1.0, 2.0]]))
    torch.testing.assert_close(result, torch.nn.functional.silu(torch.ones(1, 1)) * 2)
    if options.without_engine:
        check_message_without_engine()
    print(f"{package}: {info}")


def check_message_without_engine() -> None:
    try:
        stateful_kv.Engine.load("smollm2")
    except ImportError as error:
        assert 'run: pip install "stateful-kv[engine]"' in str(error), error
    else:
        raise AssertionError("the engine works: its packages are here, so nothing was checked")


if __name__ == "__main__":
    main()
