"""Finished blocks, and the state of unfinished work, on disk: a safetensors file each, whole or not there, with a
checksum of what is in it.

Tensors of a layer: ``<name>.codes`` int32 (out, ceil(in*bits/32)), the packed codes; ``<name>.scales`` float16
(out, groups); ``<name>.zeros`` uint8 (out, groups) in asymmetric schemes; of a layer in GGUF
blocks ``<name>.blocks`` uint8 (out, bytes of a row). Metadata: ``layers``, JSON of each layer's
scheme and in_features; ``stats``, the block's BlockStats; ``sha256`` of all the tensors and of both of these.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from auto_round.numerics.bitpack import pack, unpack
from auto_round.qtensor import BlockTensor, QTensor, QuantTensor
from auto_round.runtime.durable import write_durably
from auto_round.runtime.events import BlockStats
from auto_round.spec.blocks import BLOCK_SCHEMES, BlockScheme
from auto_round.spec.scheme import Scheme


@dataclass(frozen=True)
class _Place:
    file: Path
    scheme: Scheme
    in_features: int


class Journal:
    """Codes of the layers that are done, kept in `folder` and read back one layer at a time.

    A journal that is opened again has what was put before, but for files whose checksum is wrong: their titles are in
    `damaged`, and they count as not done.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._places: dict[str, _Place] = {}
        self._stats: dict[str, BlockStats | None] = {}
        self.damaged: list[str] = []
        folder.mkdir(parents=True, exist_ok=True)
        self._recall_all()

    def __contains__(self, title: object) -> bool:
        return title in self._stats

    def __len__(self) -> int:
        return len(self._stats)

    def put(self, title: str, tensors: Mapping[str, QuantTensor], stats: BlockStats | None = None) -> None:
        """Write the layers of one block (or of the head), called `title`, durably."""
        data: dict[str, Tensor] = {}
        layers = {}
        for name, tensor in tensors.items():
            data |= {f"{name}.{part}": values.cpu().contiguous() for part, values in _parts(tensor).items()}
            layers[name] = {**_values(tensor.scheme), "in_features": tensor.in_features}
        meta = {"layers": json.dumps(layers), "stats": json.dumps(asdict(stats) if stats else None)}
        file = self._folder / f"{title}.safetensors"
        write_durably(file, save(data, {**meta, "sha256": _digest(data, meta)}))
        self._note(file, layers, stats)

    def get(self, name: str) -> QuantTensor:
        """Read the codes of one layer; raise KeyError when it is not done."""
        place = self._places[name]
        with safe_open(place.file, framework="pt") as f:
            if isinstance(place.scheme, BlockScheme):
                return BlockTensor(f.get_tensor(f"{name}.blocks"), place.scheme)
            codes = unpack(f.get_tensor(f"{name}.codes"), place.scheme.bits, place.in_features)
            zeros = None if place.scheme.sym else f.get_tensor(f"{name}.zeros")
            return QTensor(codes, f.get_tensor(f"{name}.scales"), zeros, place.scheme)

    def drop(self, title: str) -> None:
        """Remove what was put as `title`; of its layers, what others put before counts again."""
        (self._folder / f"{title}.safetensors").unlink()
        self._places.clear()
        self._stats.clear()
        self._recall_all()

    def keep(self, title: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Write the state of unfinished work durably, in the place of its last; facts: JSON values."""
        data = {name: values.cpu().contiguous() for name, values in tensors.items()}
        meta = {"facts": json.dumps(facts)}
        write_durably(self._state(title), save(data, {**meta, "sha256": _digest(data, meta)}))

    def kept(self, title: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What `keep` wrote last; None when nothing is there or it is damaged."""
        found = _whole(self._state(title)) if self._state(title).exists() else None
        return None if found is None else (found[0], json.loads(found[1]["facts"]))

    def forget(self, title: str) -> None:
        """Remove what `keep` wrote."""
        self._state(title).unlink(missing_ok=True)

    def _state(self, title: str) -> Path:
        return self._folder / f"{title}.state"

    def stats(self, title: str) -> BlockStats | None:
        """What was measured when `title` was put; raise KeyError when it is not done."""
        return self._stats[title]

    def _note(self, file: Path, layers: Mapping[str, Mapping[str, Any]], stats: BlockStats | None) -> None:
        self._stats[file.stem] = stats
        for name, values in layers.items():
            scheme = {key: value for key, value in values.items() if key != "in_features"}
            self._places[name] = _Place(file, _scheme(scheme), values["in_features"])

    def _recall_all(self) -> None:
        for file in sorted(self._folder.glob("*.safetensors")):
            self._recall(file)

    def _recall(self, file: Path) -> None:
        found = _whole(file)
        if found is None:
            self.damaged.append(file.stem)
            file.unlink()
            return
        meta = found[1]
        stats = json.loads(meta["stats"])
        self._note(file, json.loads(meta["layers"]), BlockStats(**stats) if stats else None)


def _whole(file: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Tensors and metadata of a file, None when it is damaged."""
    try:
        with safe_open(file, framework="pt") as f:
            meta = dict(f.metadata() or {})
            data = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118  safe_open is not iterable
    except SafetensorError:
        return None
    return (data, meta) if meta.pop("sha256", None) == _digest(data, meta) else None


def _parts(tensor: QuantTensor) -> dict[str, Tensor]:
    """The tensors in which a layer is stored, by the last part of their names."""
    if isinstance(tensor, BlockTensor):
        return {"blocks": tensor.data}
    parts = {"codes": pack(tensor.codes, tensor.scheme.bits), "scales": tensor.scales}
    return parts if tensor.zeros is None else {**parts, "zeros": tensor.zeros}


def _values(scheme: Scheme) -> dict[str, Any]:
    """A scheme in what JSON has: its fields, or the name of its GGUF type."""
    return {"blocks": scheme.name} if isinstance(scheme, BlockScheme) else asdict(scheme)


def _scheme(values: Mapping[str, Any]) -> Scheme:
    return BLOCK_SCHEMES[values["blocks"]] if "blocks" in values else Scheme(**values)


def _digest(data: Mapping[str, Tensor], meta: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    for name in sorted(data):
        digest.update(name.encode())
        digest.update(data[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
