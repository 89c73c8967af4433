"""The dequantised model: an ordinary folder whose weights have the values that the codes stand for.

Weights keep the dtype they had, so the product of scale and code is rounded once where that is a 16-bit float. Any
software opens it, at the original's size; it is for measuring what quantisation did.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from auto_round.errors import FormatError
from auto_round.formats.base import CodedModel, Export, takes_the_users
from auto_round.formats.folder import in_source_order, write_json
from auto_round.formats.shards import Piece, Slot, shard_sizes, tensor_bytes, write_shards
from auto_round.source.checkpoint import DTYPE_NAMES, DTYPES, Checkpoint
from auto_round.spec.plan import LayerPlan, LinearShape, Plan
from auto_round.spec.scheme import Scheme


class FakeFormat:
    """Writer of the format. There is nothing to open: what it writes is not quantised."""

    name = "fake"
    holds_act_order = True
    holds_conv1d = True
    holds_tokenizer = False
    prescribe = takes_the_users

    def refuse(self, shape: LinearShape, scheme: Scheme) -> str | None:
        """Floats hold every scheme."""
        return None

    def check(self, plan: Plan) -> None:
        """Floats hold every plan."""

    def settings(self, plan: Plan) -> Mapping[str, Any]:
        """Nothing: the folder is an ordinary one."""
        return {}

    def sizes(self, export: Export, largest_shard: int | None) -> Mapping[str, int]:
        """The shards and their index."""
        return shard_sizes(list(_pieces(export)), largest_shard)

    def write(self, export: Export, folder: Path, largest_shard: int | None) -> None:
        """Write weights, config.json and the source's other files into `folder`."""
        write_shards(folder, list(_pieces(export)), largest_shard)
        for file in export.extra:
            shutil.copyfile(file, folder / file.name)
        write_json(folder / "config.json", export.config)

    def prove(self, export: Export, folder: Path) -> None:
        """Every weight in the folder must be its codes' value, rounded to its dtype."""
        written = Checkpoint(folder)
        for name in export.plan.quantised:
            stored = export.stored_names[name]
            expected = _weight(export, name).to(float_dtype(export, name))
            if stored not in written or not torch.equal(written.tensor(stored), expected):
                raise FormatError(f"{folder}: weight {stored!r} does not read back as it was tuned; please report this")

    def open(self, path: Path, scratch: Path) -> CodedModel | None:
        """Nothing is of this format."""
        return None


def float_dtype(export: Export, name: str) -> torch.dtype:
    """The dtype a layer's weight had in the source, else the one that config.json names, else float16."""
    stored = export.stored_names[name]
    if stored in export.checkpoint:
        return DTYPES[export.checkpoint.entries[stored].dtype]
    named = str(export.config.get("dtype") or export.config.get("torch_dtype") or "float16")
    known = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values() if dtype.is_floating_point}
    return known.get(named, torch.float16)


def _pieces(export: Export) -> Iterator[Piece]:
    def dense(layer: LayerPlan) -> Piece:
        shape = (layer.out_features, layer.in_features)
        turned = shape[::-1] if layer.name in export.transposed else shape
        return _dense(export, layer.name, turned, float_dtype(export, layer.name))

    return in_source_order(export, dense)


def _weight(export: Export, name: str) -> torch.Tensor:
    """The layer's weight as the source's tensor lies, float32."""
    weight = export.weight(name)
    return weight.t() if name in export.transposed else weight


def _dense(export: Export, name: str, shape: tuple[int, int], dtype: torch.dtype) -> Piece:
    stored = export.stored_names[name]
    slot = Slot(DTYPE_NAMES[dtype], shape, math.prod(shape) * dtype.itemsize)
    return Piece({stored: slot}, lambda: {stored: tensor_bytes(_weight(export, name).to(dtype))})


FORMAT = FakeFormat()
