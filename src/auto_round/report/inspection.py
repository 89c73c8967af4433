"""What a quantised folder or file holds, read from it alone; and whether all of it can be read."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from auto_round.errors import AutoRoundError
from auto_round.formats import open_coded
from auto_round.formats.base import CodedModel
from auto_round.formats.clients import Held, clients
from auto_round.formats.planning import plan_of, provenance_of
from auto_round.source.checkpoint import DTYPES


@dataclass(frozen=True)
class LayerRow:
    """One quantised layer: its scheme in words, shape, and bytes of all its tensors."""

    name: str
    kind: str
    out_features: int
    in_features: int
    bytes: int


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found.

    bytes_coded, bytes_plain: of the layers' tensors and of all others. bits_per_weight: stored bits of the quantised
    layers over their weights; bits_per_parameter: those of everything stored. kept: 2-D weights in blocks that are as
    they were. clients: software -> what is in the way, or None. problems: what is wrong with the tensors; empty when
    all could be read, None when they were not looked at.
    """

    path: str
    format: str
    detail: str
    layers: tuple[LayerRow, ...]
    kept: tuple[str, ...]
    bytes_coded: int
    bytes_plain: int
    bits_per_weight: float
    bits_per_parameter: float
    provenance: Mapping[str, Any]
    clients: Mapping[str, str | None]
    problems: tuple[str, ...] | None

    def to_json(self) -> str:
        """The fields as JSON."""
        return json.dumps(asdict(self), indent=2) + "\n"


def inspect(path: str | Path, *, check: bool = True) -> Inspection:
    """Read what the quantised folder or file `path` holds.

    check: read every tensor too, and list those that are not finite or that the config does not fit. Raises SourceError
    or FormatError when it cannot be opened at all.
    """
    with tempfile.TemporaryDirectory(prefix="auto-round-") as scratch:
        model = open_coded(path, Path(scratch))
        return _describe(model, tuple(_problems(model)) if check else None)


def _describe(model: CodedModel, problems: tuple[str, ...] | None) -> Inspection:
    rows = tuple(
        LayerRow(layer.name, layer.kind, layer.out_features, layer.in_features, layer.nbytes)
        for layer in model.layers.values()
    )
    plan = plan_of(model)
    weights = sum(row.out_features * row.in_features for row in rows)
    coded = sum(row.bytes for row in rows)
    owned = {tensor for layer in model.layers.values() for tensor in layer.tensors}
    others = {name: entry for name, entry in model.checkpoint.entries.items() if name not in owned}
    plain = sum(entry.nbytes for entry in others.values())
    parameters = weights + sum(torch.Size(entry.shape).numel() for entry in others.values())
    act_order = any(layer.act_order for layer in model.layers.values())
    return Inspection(
        path=str(model.path),
        format=model.format,
        detail=model.detail,
        layers=rows,
        kept=tuple(plan.kept),
        bytes_coded=coded,
        bytes_plain=plain,
        bits_per_weight=8 * coded / weights,
        bits_per_parameter=8 * (coded + plain) / parameters,
        provenance=provenance_of(model.settings),
        clients=clients(Held(plan, model.format, model.settings, act_order)),
        problems=problems,
    )


def _problems(model: CodedModel) -> list[str]:
    """Read every tensor once."""
    found = []
    owned = {tensor for layer in model.layers.values() for tensor in layer.tensors}
    for name in model.layers:
        try:
            model.weight(name)
        except AutoRoundError as error:
            found.append(str(error))
    for name, entry in model.checkpoint.entries.items():
        if name in owned or not entry.nbytes or entry.dtype not in DTYPES:
            continue
        tensor = model.checkpoint.tensor(name)
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
            found.append(f"{entry.file}: tensor {name!r} holds infinity or NaN")
    return found
