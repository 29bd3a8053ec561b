"""Packages that ops and state do without, and the extra of this package that brings them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

# The import names; pyproject.toml has the same ones, with versions.
EXTRAS = {
    "engine": ("gguf", "jinja2", "safetensors", "tokenizers"),
    "cli": ("matplotlib", "rich", "typer"),
}


@contextmanager
def needs(extra: str, what: str) -> Iterator[None]:
    """Imports inside the block are of packages of an extra, for `what`.

    Raises:
        ImportError: one of them is not installed; the message says which, and what to install.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in EXTRAS[extra]:
            raise  # a fault of that package, or of ours
        raise ImportError(
            f'{what} needs {missing}, run: pip install "stateful-kv[{extra}]"', name=missing
        ) from error
