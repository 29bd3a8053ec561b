"""Files that the command line writes: whole under their name, or not there at all.

A file is written beside its place under another name and renamed when it is complete. So a full
disk, an error or a signal leaves an older file of that name as it was.
"""

from __future__ import annotations

import os
import secrets
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from stateful_kv.errors import InvalidRequestError

# Temporary files of this process that were neither renamed nor removed yet.
_unfinished: set[str] = set()


class OutputFile:
    """A file in the making; `commit` puts it in its place, `discard` forgets it.

    Attributes:
        path: the path as it was asked for.
        file: where to write; text is encoded as UTF-8, what has no UTF-8 is escaped.
        replaces: whether there was a file of that name when this one was begun.
    """

    def __init__(self, path: Path) -> None:
        """Makes missing folders and the temporary file; OSError if the place cannot be written."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        # What a link points to is replaced, not the link.
        self._target = os.path.realpath(path)
        self._temporary: str | None = None
        found = _stat(path)
        self.replaces = found is not None
        if found is not None and not _can_be_renamed_over(found):
            # A terminal, a pipe, or the standard output under another name.
            handle = os.open(path, os.O_WRONLY | os.O_APPEND)
        else:
            handle = self._open_temporary(found)
        self.file: TextIO = os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace")

    def _open_temporary(self, found: os.stat_result | None) -> int:
        if found is not None and not os.access(self._target, os.W_OK):
            raise PermissionError(f"{self.path}: the file must not be written")
        folder, name = os.path.split(self._target)
        temporary = os.path.join(folder, f".{name[:40]}.{secrets.token_hex(4)}.tmp")
        # With these bits a new file gets the permissions that the user's umask allows.
        _unfinished.add(temporary)
        try:
            handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except BaseException:
            _remove(temporary)
            raise
        self._temporary = temporary
        if found is not None:
            with suppress(OSError):  # some file systems have no permissions
                os.fchmod(handle, stat.S_IMODE(found.st_mode))
        return handle

    def same_file(self, other: str | os.PathLike[str]) -> bool:
        """Whether this output would end up in the file `other`."""
        if os.path.realpath(other) == self._target:
            return True
        mine, theirs = _stat(Path(self._target)), _stat(Path(other))
        return mine is not None and theirs is not None and os.path.samestat(mine, theirs)

    def write_bytes(self, data: bytes) -> None:
        """Writes bytes as they are."""
        self.file.flush()
        self.file.buffer.write(data)

    def commit(self) -> None:
        """Puts the file in its place; an older one is replaced in one step."""
        self.file.flush()
        temporary = self._temporary
        if temporary is not None:
            # A disk may say only now that it is full.
            os.fsync(self.file.fileno())
        self.file.close()
        if temporary is not None:
            self._temporary = None
            _unfinished.discard(temporary)
            try:
                os.replace(temporary, self._target)
            except OSError as error:
                # Minutes of work may be in it, so it is not removed.
                reason = error.strerror or "it cannot be renamed"
                raise OSError(f"{self.path}: {reason}; the file is kept as {temporary}") from error

    def discard(self) -> None:
        """Removes what was written, unless it is in its place already."""
        with suppress(OSError):  # the disk may be full, and nobody wants the rest
            self.file.close()
        if self._temporary is not None:
            _remove(self._temporary)
            self._temporary = None


@contextmanager
def output_files(
    *paths: Path | None, inputs: Iterable[Path] = ()
) -> Iterator[list[OutputFile | None]]:
    """Begins the files before the run, so that a bad path is found before minutes are spent.

    Gives a file for each path, None for None. What is not committed in the block is discarded.

    Raises:
        InvalidRequestError: two paths name one file, or a path names a file that the run reads,
            `inputs`; also through links.
        OSError: a path cannot be written.
    """
    inputs = list(inputs)
    files: list[OutputFile | None] = []
    try:
        for path in paths:
            if path is None:
                files.append(None)
                continue
            output = OutputFile(path)
            others = [file for file in files if file is not None]
            files.append(output)
            if any(output.same_file(other.path) for other in others):
                raise InvalidRequestError(f"expected a file for each output, got {path} twice")
            _refuse_inputs(output, inputs)
        yield files
    finally:
        for file in files:
            if file is not None:
                file.discard()


def _refuse_inputs(output: OutputFile, inputs: list[Path]) -> None:
    for source in inputs:
        if source.is_file() and output.same_file(source):
            raise InvalidRequestError(
                f"{output.path}: expected another file for the output, the run reads {source}"
            )


def remove_unfinished() -> None:
    """Removes all temporary files, for a process that ends at once."""
    for temporary in list(_unfinished):
        _remove(temporary)


def _remove(temporary: str) -> None:
    with suppress(OSError):
        os.unlink(temporary)
    _unfinished.discard(temporary)


def _stat(path: Path) -> os.stat_result | None:
    """What is there, or None; raises OSError where nothing could be, as for too long a name."""
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


def _can_be_renamed_over(found: os.stat_result) -> bool:
    if not stat.S_ISREG(found.st_mode):
        return False
    for stream in (sys.__stdout__, sys.__stderr__):
        # /dev/stdout is a regular file where the shell redirected it to such a file.
        with suppress(OSError, ValueError, AttributeError):
            if stream is not None and os.path.samestat(found, os.fstat(stream.fileno())):
                return False
    return True
