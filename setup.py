"""Builds the extension: find the installed torch, call CMake once, copy what it installs.

An sdist and its metadata know no torch, so that they are the same wherever they are made. A wheel
is for one minor version of torch: it requires that one, and its build tag names it.
"""

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 11)
OPTIONS = ("STATEFUL_KV_CUDA", "STATEFUL_KV_CUDA_ARCHS", "STATEFUL_KV_WERROR")
# Whoever runs one of these wants a build; metadata alone (egg_info) and sdist come without torch.
BUILDS = {
    "bdist_wheel", "build", "build_ext", "develop", "dist_info", "editable_wheel", "install",
}  # fmt: skip
NO_TORCH = """
stateful-kv is built against the torch that you run, and none was found here.
Install torch, "setuptools>=77", wheel, "cmake>=3.25" and ninja, then build without isolation:
    pip install --no-build-isolation ...
    uv pip install --no-build-isolation ...
    uv build --no-build-isolation
    python -m build --no-isolation
Or name the folder of a torch package: STATEFUL_KV_TORCH_DIR=.../site-packages/torch
A source archive alone needs no torch: python -m build --sdist"""


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


def needed_torch() -> Path:
    """Links are followed: under another path a kept build folder would compile everything again."""
    return (find_torch() or sys.exit(NO_TORCH)).resolve()


def torch_minor(torch_dir: Path) -> tuple[int, int]:
    text = (torch_dir / "version.py").read_text()
    found = re.search(r"^__version__ = ['\"](\d+)\.(\d+)\.", text, re.MULTILINE)
    if not found:
        sys.exit(f"{torch_dir}/version.py: expected a line such as __version__ = '2.13.0'")
    minor = (int(found[1]), int(found[2]))
    if minor < OLDEST_TORCH:
        expected = ".".join(map(str, OLDEST_TORCH))
        sys.exit(f"torch: expected {expected} or newer, got {found[1]}.{found[2]} in {torch_dir}")
    return minor


def torch_tag(torch_dir: Path) -> str:
    """Minor version and device, such as pt213cpu or pt213cu130; cpu also where CUDA is off."""
    text = (torch_dir / "version.py").read_text()
    cuda = re.search(r"^cuda\b.*= ['\"](\d+)\.(\d+)", text, re.MULTILINE)
    is_off = os.environ.get("STATEFUL_KV_CUDA", "").upper() == "OFF"
    device = "cpu" if is_off or not cuda else f"cu{cuda[1]}{cuda[2]}"
    return "pt{}{}".format(*torch_minor(torch_dir)) + device


def version() -> str:
    """The same everywhere, but for release wheels: an sdist whose version varies is discarded."""
    text = (ROOT / "python" / "stateful_kv" / "_version.py").read_text()
    plain = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)[1]
    local = os.environ.get("STATEFUL_KV_LOCAL_VERSION")
    if not local or BUILDS.isdisjoint(sys.argv[1:]):
        return plain
    return f"{plain}+{torch_tag(needed_torch()) if local == 'auto' else local}"


def requirements() -> list[str]:
    oldest = "torch>={}.{}".format(*OLDEST_TORCH)
    if not BUILDS.isdisjoint(sys.argv[1:]):
        # The library loads in this minor version only (docs/adr/0002-classic-libtorch-abi.md).
        oldest = "torch=={}.{}.*".format(*torch_minor(needed_torch()))
    return [oldest, "numpy"]


def cmake_options() -> list[str]:
    """Forgets the options that a kept build folder has from its last build, then sets ours."""
    given = [f"-D{option}={value}" for option in OPTIONS if (value := os.environ.get(option))]
    return ["-USTATEFUL_KV_*", *given]


class CMakeBuild(build_ext):
    """Runs CMake in build/ (kept, or STATEFUL_KV_BUILD_DIR) and installs the libraries."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build_dir = Path(os.environ.get("STATEFUL_KV_BUILD_DIR") or Path(self.build_temp).resolve())
        build_dir.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja", *cmake_options(),
            f"-DPython3_EXECUTABLE={sys.executable}",
            f"-DSTATEFUL_KV_TORCH_DIR={needed_torch()}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
        ]  # fmt: skip
        if ninja := shutil.which("ninja"):
            # Said each time: a kept build folder remembers that of an isolated build, now deleted.
            configure.append(f"-DCMAKE_MAKE_PROGRAM={ninja}")
        subprocess.run(configure, check=True)
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        build = ["cmake", "--build", str(build_dir), "--target", "_C", "-j", jobs]
        subprocess.run(build, check=True)
        install = ["cmake", "--install", str(build_dir), "--component", "python"]
        prefixes = [target.parent]
        if self.editable_mode:  # setuptools moves `_C` to the sources, and knows no other library
            prefixes.append(ROOT / "python")
        for prefix in prefixes:
            subprocess.run([*install, "--prefix", str(prefix)], check=True)


class TaggedWheel(bdist_wheel):
    """A wheel whose name says which torch it is for: stateful_kv-0.1.0-1pt213cpu-cp311-..."""

    def finalize_options(self) -> None:
        self.build_number = self.build_number or f"1{torch_tag(needed_torch())}"
        super().finalize_options()

    def run(self) -> None:
        # The folder that setuptools collects files in stays; what was deleted since must not ship.
        shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)
        super().run()


setup(
    version=version(),
    install_requires=requirements(),
    ext_modules=[Extension("stateful_kv._C", sources=[])],
    cmdclass={"bdist_wheel": TaggedWheel, "build_ext": CMakeBuild},
)
