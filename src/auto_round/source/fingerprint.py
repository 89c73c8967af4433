"""What a model's files hold, in one hash that takes a second also for the largest model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from auto_round.source.checkpoint import Checkpoint, TensorEntry

PIECE = 4096  # bytes
PIECES = 4


def fingerprint(checkpoint: Checkpoint) -> str:
    """SHA-256 over the names, dtypes, shapes and samples of all tensors, as hexadecimal digits.

    Of each tensor, PIECES pieces of PIECE bytes are read, evenly spread from the first byte to the last; small tensors
    are read whole. Any training moves nearly all weights, so the samples of hundreds of tensors tell two checkpoints
    apart; what they cannot see is a file edited by hand in a few places between a crash and the next start. Reading
    all bytes would cost as much as the plain rounding of the whole model.
    """
    digest = hashlib.sha256()
    for file, entries in _by_file(checkpoint.entries.items()).items():
        with file.open("rb", buffering=0) as f:
            for name, entry in entries:
                digest.update(f"{name} {entry.dtype} {entry.shape} {entry.nbytes}\n".encode())
                for begin, length in pieces(entry.nbytes):
                    f.seek(entry.offset + begin)
                    digest.update(f.read(length))
    return digest.hexdigest()


def pieces(nbytes: int) -> list[tuple[int, int]]:
    """(first byte, length) of the samples of a tensor of `nbytes`."""
    if nbytes <= PIECE * PIECES:
        return [(0, nbytes)]
    return [((nbytes - PIECE) * i // (PIECES - 1), PIECE) for i in range(PIECES)]


def hash_files(files: Iterable[Path]) -> str:
    """SHA-256 over the names and the bytes of small files, as hexadecimal digits."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _by_file(entries: Iterable[tuple[str, TensorEntry]]) -> dict[Path, list[tuple[str, TensorEntry]]]:
    files: dict[Path, list[tuple[str, TensorEntry]]] = {}
    for name, entry in entries:
        files.setdefault(entry.file, []).append((name, entry))
    return files
