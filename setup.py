"""Builds the extension: find the installed torch, call CMake once, copy the one library."""

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BASE_VERSION = "0.1.0"
NO_TORCH = """stateful-kv is built against the torch you run, and none was found.
Install torch first, then build without isolation:
    pip install torch
    pip install --no-build-isolation .
Or name the folder of the torch package: STATEFUL_KV_TORCH_DIR=.../site-packages/torch"""


def is_torch_dir(path: Path) -> bool:
    return (path / "include" / "torch" / "library.h").is_file()


def find_torch() -> Path | None:
    """The torch of the target environment, without importing it.

    In pip's isolated build this interpreter does not see site-packages of the environment; a
    child started with -I (which ignores the build environment's paths) does.
    """
    if named := os.environ.get("STATEFUL_KV_TORCH_DIR"):
        if not is_torch_dir(Path(named)):
            sys.exit(f"STATEFUL_KV_TORCH_DIR: expected the folder of a torch package, got {named}")
        return Path(named)
    spec = find_spec("torch")
    if spec and spec.submodule_search_locations:
        path = Path(spec.submodule_search_locations[0])
        if is_torch_dir(path):
            return path
    probe = (
        "from importlib.util import find_spec as f; s = f('torch');"
        "print(s.submodule_search_locations[0] if s else '')"
    )
    child = subprocess.run([sys.executable, "-I", "-c", probe], capture_output=True, text=True)
    path = Path(child.stdout.strip() or "-")
    return path if is_torch_dir(path) else None


def version() -> str:
    """Base version plus torch minor and device, so that two wheels cannot be confused."""
    torch_dir = find_torch()
    if torch_dir is None:
        return BASE_VERSION
    text = (torch_dir / "version.py").read_text()
    found = re.search(r"__version__ = '(\d+)\.(\d+)[^+']*(?:\+(\w+))?'", text)
    if not found:
        return BASE_VERSION
    major, minor, device = found.groups()
    return f"{BASE_VERSION}+pt{major}{minor}{device or ''}"


class CMakeBuild(build_ext):
    """Runs CMake in build/ (kept between runs, or STATEFUL_KV_BUILD_DIR) and copies `_C`."""

    def build_extension(self, ext: Extension) -> None:
        torch_dir = find_torch()
        if torch_dir is None:
            sys.exit(NO_TORCH)
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build_dir = Path(os.environ.get("STATEFUL_KV_BUILD_DIR") or Path(self.build_temp).resolve())
        build_dir.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja",
            f"-DPython3_EXECUTABLE={sys.executable}",
            f"-DSTATEFUL_KV_TORCH_DIR={torch_dir}",
            f"-DSTATEFUL_KV_VERSION={BASE_VERSION}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
        ]  # fmt: skip
        if ninja := shutil.which("ninja"):
            # Said each time: a kept build folder remembers that of an isolated build, now deleted.
            configure.append(f"-DCMAKE_MAKE_PROGRAM={ninja}")
        for option in ("STATEFUL_KV_CUDA", "STATEFUL_KV_CUDA_ARCHS", "STATEFUL_KV_WERROR"):
            if value := os.environ.get(option):
                configure.append(f"-D{option}={value}")
        subprocess.run(configure, check=True)
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        build = ["cmake", "--build", str(build_dir), "--target", "_C", "-j", jobs]
        subprocess.run(build, check=True)
        install = ["cmake", "--install", str(build_dir), "--component", "python"]
        subprocess.run([*install, "--prefix", str(target.parent)], check=True)


setup(
    version=version(),
    ext_modules=[Extension("stateful_kv._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
