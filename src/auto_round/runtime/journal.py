"""Finished blocks on disk: one safetensors file each, written to a temporary name, synced and renamed.

Tensors of a layer: ``<name>.codes`` int32 (out, ceil(in*bits/32)), the packed codes; ``<name>.scales`` float16
(out, groups); ``<name>.zeros`` uint8 (out, groups) in asymmetric schemes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from auto_round.numerics.bitpack import pack, unpack
from auto_round.qtensor import QTensor
from auto_round.spec.scheme import Scheme


@dataclass(frozen=True)
class _Place:
    file: Path
    scheme: Scheme
    in_features: int


class Journal:
    """Codes of the layers that are done, kept in `folder` and read back one layer at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._places: dict[str, _Place] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def put(self, title: str, tensors: Mapping[str, QTensor]) -> None:
        """Write the layers of one block (or of the head), called `title`, durably."""
        data, meta = {}, {}
        for name, tensor in tensors.items():
            data[f"{name}.codes"] = pack(tensor.codes, tensor.scheme.bits).cpu()
            data[f"{name}.scales"] = tensor.scales.cpu().contiguous()
            if tensor.zeros is not None:
                data[f"{name}.zeros"] = tensor.zeros.cpu().contiguous()
            meta[name] = json.dumps({**asdict(tensor.scheme), "in_features": tensor.in_features}, sort_keys=True)
        file = self._folder / f"{title}.safetensors"
        temporary = file.with_suffix(".tmp")
        save_file(data, temporary, metadata=meta)
        sync(temporary)
        temporary.rename(file)
        for name, tensor in tensors.items():
            self._places[name] = _Place(file, tensor.scheme, tensor.in_features)

    def get(self, name: str) -> QTensor:
        """Read the codes of one layer; raise KeyError when it is not done."""
        place = self._places[name]
        with safe_open(place.file, framework="pt") as f:
            codes = unpack(f.get_tensor(f"{name}.codes"), place.scheme.bits, place.in_features)
            zeros = None if place.scheme.sym else f.get_tensor(f"{name}.zeros")
            return QTensor(codes, f.get_tensor(f"{name}.scales"), zeros, place.scheme)


def sync(path: Path) -> None:
    """Force a file (or folder entry) to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
