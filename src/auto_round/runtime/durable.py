"""Files that are whole or not there: written to a temporary name, forced to disk, renamed, the rename forced too."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from auto_round.errors import OutputError

GO_ON = "What is done is kept; when that is solved, the same command goes on from there."
FULL = (errno.ENOSPC, errno.EDQUOT)
REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM)


def sync(path: Path) -> None:
    """Force a file, or a folder's list of entries, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Force every file and folder below `folder`, and itself, to disk."""
    for item in folder.rglob("*"):
        sync(item)
    sync(folder)


def write_durably(file: Path, data: bytes) -> None:
    """Write `file`; when this returns it survives a power cut, and before that its old content stands."""
    temporary = file.with_name(file.name + ".tmp")
    try:
        with temporary.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        temporary.rename(file)
    except OSError:
        temporary.unlink(missing_ok=True)  # on a full disk its bytes are needed
        raise
    sync(file.parent)


@contextmanager
def disk_errors(folder: Path, advice: str) -> Iterator[None]:
    """Turn a full, read-only or forbidden disk below `folder` into an OutputError that ends in `advice`."""
    try:
        yield
    except OSError as error:
        where = error.filename or folder
        if error.errno in FULL:
            raise OutputError(f"{where}: the disk is full. {advice}") from None
        if error.errno in REFUSED:
            raise OutputError(f"{where}: cannot be written: {error.strerror}. {advice}") from None
        raise
