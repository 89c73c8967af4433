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
from auto_round.runtime.durable import sync
from auto_round.source.checkpoint import DTYPE_NAMES, DTYPES, Checkpoint

INDEX = "model.safetensors.index.json"
LARGEST = 5 * 10**9  # bytes of a file where none are asked for
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


def parse_size(text: str | int, name: str = "max_shard_size") -> int:
    """Bytes of a size such as "5GB", "500MB" or a number; raise FormatError when it is not understood."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "B": 1}
    upper = str(text).strip().upper().replace("IB", "B")
    unit = next((u for u in units if upper.endswith(u)), "")
    try:
        size = int(float(upper.removesuffix(unit)) * units.get(unit, 1))
    except ValueError:
        size = 0
    if size <= 0:
        raise FormatError(f"{name}={text!r} is not a size; write it like 5GB or 500MB")
    return size


def write_shards(folder: Path, pieces: Sequence[Piece], largest: int | None) -> list[Path]:
    """Write the pieces in order into one or more files of at most `largest` bytes each, and the index last.

    A piece that is larger alone gets a file of its own. largest: None for `LARGEST`. Returns the files.
    """
    shards = _shards(pieces, largest)
    files = [_write_shard(folder / name, shard) for name, shard in shards.items()]
    if len(shards) > 1:
        (folder / INDEX).write_text(_index(shards), encoding="utf-8")
    return files


def shard_sizes(pieces: Sequence[Piece], largest: int | None) -> dict[str, int]:
    """The files that `write_shards` would make and the bytes of each, without making a tensor."""
    shards = _shards(pieces, largest)
    sizes = {name: len(_header(shard)) + sum(piece.nbytes for piece in shard) for name, shard in shards.items()}
    return {**sizes, **({INDEX: len(_index(shards))} if len(shards) > 1 else {})}


def _shards(pieces: Sequence[Piece], largest: int | None) -> dict[str, list[Piece]]:
    largest = LARGEST if largest is None else largest
    shards: list[list[Piece]] = [[]]
    filled = 0
    for piece in pieces:
        if shards[-1] and filled + piece.nbytes > largest:
            shards.append([])
            filled = 0
        shards[-1].append(piece)
        filled += piece.nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def _index(shards: Mapping[str, Sequence[Piece]]) -> str:
    owners = {name: file for file, shard in shards.items() for piece in shard for name in piece.slots}
    total = sum(piece.nbytes for shard in shards.values() for piece in shard)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(owners.items()))}
    return json.dumps(index, indent=2) + "\n"


def _order(pieces: Sequence[Piece]) -> dict[str, Slot]:
    """Widest dtypes first, so that every tensor lies at a multiple of its own item size without holes."""
    slots = {name: slot for piece in pieces for name, slot in piece.slots.items()}
    return dict(sorted(slots.items(), key=lambda item: -_itemsize(item[1].dtype)))


def _header(pieces: Sequence[Piece]) -> bytes:
    """All that stands in a file before the data."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, slot in _order(pieces).items():
        end = position + slot.nbytes
        header[name] = {"dtype": slot.dtype, "shape": list(slot.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def _write_shard(file: Path, pieces: Sequence[Piece]) -> Path:
    slots, head = _order(pieces), _header(pieces)
    starts, position = {}, len(head)
    for name, slot in slots.items():
        starts[name] = position
        position += slot.nbytes
    with file.open("wb") as f:
        f.write(head)
        f.truncate(position)
        for piece in pieces:
            for name, data in piece.make().items():
                if len(data) != slots[name].nbytes:
                    raise FormatError(f"tensor {name!r} has {len(data)} bytes, its header says {slots[name].nbytes}")
                f.seek(starts[name])
                f.write(data)
    sync(file)
    return file


def _itemsize(dtype: str) -> int:
    return DTYPES[dtype].itemsize if dtype in DTYPES else 1
