#!/usr/bin/env python3
"""Makes a folder in which an interpreter finds some installed packages, and what they require.

    borrow.py FOLDER DISTRIBUTION...

Named in a .pth file of an empty environment, it stands for an installation that would be a large
download. Only links are made, so it takes no space, and nothing else can be found there.
"""

import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement


def with_requirements(names: list[str]) -> set[str]:
    found: set[str] = set()
    todo = list(names)
    while todo:
        name = todo.pop()
        if name in found:
            continue
        try:
            required = distribution(name).requires or []
        except PackageNotFoundError:
            if name in names:
                raise
            continue  # left out here too: whoever needs it will say so
        found.add(name)
        for text in required:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                todo.append(requirement.name)
    return found


def link_all(folder: Path, names: set[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        parts = distribution(name)
        for top in {file.parts[0] for file in parts.files or []} - {"..", "__pycache__"}:
            # Folders that several packages share, such as `nvidia`, are linked once.
            if not (folder / top).exists():
                (folder / top).symlink_to(Path(str(parts.locate_file(top))).resolve())


if __name__ == "__main__":
    link_all(Path(sys.argv[1]), with_requirements(sys.argv[2:]))
