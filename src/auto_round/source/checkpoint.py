"""A folder of safetensors, opened lazily: headers are read and checked at once, tensors when they are asked for.

A safetensors file is: u64 header length, JSON header {name: {dtype, shape, data_offsets: [begin, end]}}, data. Offsets
count from the end of the header; entries neither overlap nor leave holes (https://github.com/huggingface/safetensors).
Tensors are read with plain reads, not mapped, so that what was read does not stay in the process's resident memory.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from auto_round.errors import SourceError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
LARGEST_HEADER = 100_000_000  # bytes; the limit of the reference implementation


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: file, dtype name as in the header, shape, first byte in the file, length in bytes."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(file: Path) -> dict[str, TensorEntry]:
    """Read and check the header of one safetensors file; raise SourceError saying what is wrong with it."""
    size = file.stat().st_size
    with file.open("rb") as f:
        head = f.read(8)
        if len(head) < 8:
            raise SourceError(f"{file}: only {size} bytes, not a safetensors file; download it again")
        (length,) = struct.unpack("<Q", head)
        if length > min(LARGEST_HEADER, size - 8):
            raise SourceError(f"{file}: header of {length} bytes does not fit the file of {size}; it is truncated")
        try:
            header: dict[str, Any] = json.loads(f.read(length))
        except (ValueError, RecursionError) as error:
            raise SourceError(f"{file}: header is not valid JSON ({error}); the file is damaged") from None
    if not isinstance(header, dict):
        raise SourceError(f"{file}: header is a JSON {type(header).__name__}, not an object; the file is damaged")
    header.pop("__metadata__", None)
    entries = {name: _entry(file, name, info, 8 + length) for name, info in header.items()}
    _check_extents(file, entries, 8 + length, size)
    return entries


def _entry(file: Path, name: str, info: Any, start: int) -> TensorEntry:
    try:
        dtype, shape, (begin, end) = info["dtype"], info["shape"], info["data_offsets"]
        whole = isinstance(dtype, str) and all(type(n) is int and n >= 0 for n in (*shape, begin, end))
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise SourceError(f"{file}: the header entry of tensor {name!r} is damaged")
    if dtype in DTYPES and end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        raise SourceError(f"{file}: tensor {name!r} of {dtype} {list(shape)} claims {end - begin} bytes")
    return TensorEntry(file, dtype, tuple(shape), start + begin, end - begin)


def _check_extents(file: Path, entries: dict[str, TensorEntry], start: int, size: int) -> None:
    position = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset != position or entry.nbytes < 0:
            raise SourceError(f"{file}: tensor {name!r} overlaps another or leaves a hole; the file is damaged")
        position += entry.nbytes
    if position != size:
        state = "truncated" if position > size else "longer than its header says"
        raise SourceError(f"{file}: {state} ({size} bytes, header needs {position}); download it again")


class Checkpoint:
    """The tensors of a model folder by name.

    Raises SourceError when the folder has no safetensors, when an index names a missing shard or a path outside the
    folder, or when a file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: dict[str, TensorEntry] = {}
        for file in _shards(folder):
            for name, entry in read_header(file).items():
                if name in self.entries:
                    raise SourceError(f"tensor {name!r} is in both {self.entries[name].file.name} and {file.name}")
                self.entries[name] = entry

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.entries.values())

    def raw(self, name: str) -> bytearray:
        """Return the bytes of a tensor as they lie in the file."""
        entry = self.entries[name]
        buffer = bytearray(entry.nbytes)
        with entry.file.open("rb", buffering=0) as f:
            f.seek(entry.offset)
            view, done = memoryview(buffer), 0
            while done < entry.nbytes:
                count = f.readinto(view[done:])
                if not count:
                    raise SourceError(f"{entry.file}: ended while tensor {name!r} was read; the file changed on disk")
                done += count
        return buffer

    def tensor(self, name: str) -> Tensor:
        """Read one tensor into memory in its stored dtype and shape; raise SourceError if it is not there."""
        if name not in self.entries:
            raise SourceError(f"{self.folder}: the checkpoint holds no tensor {name!r}")
        entry = self.entries[name]
        if entry.dtype not in DTYPES:
            raise SourceError(f"{entry.file}: tensor {name!r} has dtype {entry.dtype}, which is not supported")
        if not entry.nbytes:
            return torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        return torch.frombuffer(self.raw(name), dtype=DTYPES[entry.dtype]).reshape(entry.shape)


def _shards(folder: Path) -> list[Path]:
    """Return the safetensors files that make up the model: the single one where there is one, as in transformers."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.is_file():
        return [single]
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            raise SourceError(f"{index}: not a valid index; it needs a weight_map from tensor to file") from None
        for name in names:
            if not isinstance(name, str) or Path(name).name != name:
                raise SourceError(f"{index}: names {name!r}, a path outside the folder; refused")
            if not (folder / name).is_file():
                raise SourceError(f"{index}: names {name!r}, which is not in the folder; download it again")
        return [folder / name for name in names]
    pickles = sorted([*folder.glob("pytorch_model*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
    if pickles:
        raise SourceError(
            f"{folder}: holds {pickles[0].name}, a pickle, which can run code when read: refused. Convert it once:\n"
            f"python -c \"from transformers import AutoModelForCausalLM as M; M.from_pretrained('{folder}')"
            f".save_pretrained('{folder}-safetensors')\" and copy the tokenizer files beside it"
        )
    others = sorted(folder.glob("*.safetensors"))
    if len(others) == 1:
        return others
    found = ", ".join(f.name for f in others) or "none"
    raise SourceError(
        f"{folder}: no model.safetensors and no model.safetensors.index.json (safetensors found: {found})"
    )
