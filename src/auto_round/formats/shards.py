"""Writing safetensors shards from pieces that are made one at a time, so that the model is never in memory."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from auto_round.errors import FormatError
from auto_round.formats.layouts import TensorSpec
from auto_round.runtime.journal import sync
from auto_round.source.checkpoint import DTYPE_NAMES, DTYPES, Checkpoint

ALIGNMENT = 8  # bytes; every tensor starts at a multiple, as strict readers want


@dataclass(frozen=True)
class Slot:
    """One tensor of the output: dtype name as in the header, shape, length in bytes."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Piece:
    """Tensors that are made together: slots by name, and how to make their bytes. A piece stays in one shard."""

    slots: Mapping[str, Slot]
    make: Callable[[], Mapping[str, bytes | bytearray | memoryview]]

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(slot.nbytes for slot in self.slots.values())


def copied(checkpoint: Checkpoint, name: str) -> Piece:
    """A tensor of the source, passed through byte for byte, whatever its dtype."""
    entry = checkpoint.entries[name]
    slot = Slot(entry.dtype, entry.shape, entry.nbytes)
    return Piece({name: slot}, lambda: {name: checkpoint.raw(name)})


def encoded(prefix: str, specs: Mapping[str, TensorSpec], encode: Callable[[], Mapping[str, Tensor]]) -> Piece:
    """The tensors of one quantised layer; `specs` must be what `encode` gives."""
    slots = {}
    for suffix, (dtype, shape) in specs.items():
        slots[f"{prefix}.{suffix}"] = Slot(DTYPE_NAMES[dtype], shape, math.prod(shape) * dtype.itemsize)

    def make() -> dict[str, memoryview]:
        return {f"{prefix}.{suffix}": tensor_bytes(tensor) for suffix, tensor in encode().items()}

    return Piece(slots, make)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor as they go to a file."""
    return tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data


def parse_size(text: str | int) -> int:
    """Bytes of a size such as "5GB", "500MB" or a number; raise FormatError when it is not understood."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "B": 1}
    upper = str(text).strip().upper().replace("IB", "B")
    unit = next((u for u in units if upper.endswith(u)), "")
    try:
        size = int(float(upper.removesuffix(unit)) * units.get(unit, 1))
    except ValueError:
        size = 0
    if size <= 0:
        raise FormatError(f"max_shard_size={text!r} is not a size; write it like 5GB or 500MB")
    return size


def write_shards(folder: Path, pieces: Sequence[Piece], largest: int) -> list[Path]:
    """Write the pieces in order into one or more files of at most `largest` bytes each, and the index last.

    A piece that is larger alone gets a file of its own. Returns the files.
    """
    shards: list[list[Piece]] = [[]]
    for piece in pieces:
        if shards[-1] and sum(p.nbytes for p in shards[-1]) + piece.nbytes > largest:
            shards.append([])
        shards[-1].append(piece)
    files = []
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        files.append(_write_shard(folder / name, shard))
    if len(shards) > 1:
        owners = {name: file.name for file, shard in zip(files, shards, strict=True) for p in shard for name in p.slots}
        index = {
            "metadata": {"total_size": sum(p.nbytes for p in pieces)},
            "weight_map": dict(sorted(owners.items())),
        }
        path = folder / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return files


def _write_shard(file: Path, pieces: Sequence[Piece]) -> Path:
    # Widest dtypes first, so that every tensor lies at a multiple of its own item size without holes.
    slots = {name: slot for piece in pieces for name, slot in piece.slots.items()}
    order = sorted(slots, key=lambda name: -_itemsize(slots[name].dtype))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets, position = {}, 0
    for name in order:
        slot = slots[name]
        offsets[name] = position
        header[name] = {
            "dtype": slot.dtype,
            "shape": list(slot.shape),
            "data_offsets": [position, position + slot.nbytes],
        }
        position += slot.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with file.open("wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        start = f.tell()
        f.truncate(start + position)
        for piece in pieces:
            for name, data in piece.make().items():
                if len(data) != slots[name].nbytes:
                    raise FormatError(f"tensor {name!r} has {len(data)} bytes, its header says {slots[name].nbytes}")
                f.seek(start + offsets[name])
                f.write(data)
    sync(file)
    return file


def _itemsize(dtype: str) -> int:
    return DTYPES[dtype].itemsize if dtype in DTYPES else 1
