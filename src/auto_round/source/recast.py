"""The source's tensors under the names that a quantised folder needs: packed tensors cannot be merged or split again.

transformers computes some parameters from several tensors (see naming.py). A layer of that kind is written under its
own name in the model, and so is what came from the same tensors; everything else keeps its name, bytes and place.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from auto_round.errors import SpecError
from auto_round.source.checkpoint import DTYPE_NAMES, DTYPES, Checkpoint, TensorEntry
from auto_round.source.skeleton import Skeleton

PACKED = ("qweight", "qzeros", "scales")


def output_name(skeleton: Skeleton, layer: str) -> str | None:
    """What the tensors of the quantised `layer` are called in the output, without suffix.

    It is the source's name where transformers leads it back to the layer, else the layer's own; None if neither does.
    """
    stored = skeleton.stored_name(f"{layer}.weight") or ""
    candidates = [stored.removesuffix(".weight")] if stored.endswith(".weight") else []
    return next((name for name in (*candidates, layer) if _leads_to(skeleton, name, layer, PACKED)), None)


def _leads_to(skeleton: Skeleton, name: str, layer: str, suffixes: Iterable[str]) -> bool:
    names = {f"{layer}.{suffix}": True for suffix in suffixes}
    return all(skeleton.naming.rename(f"{name}.{suffix}", names) == (f"{layer}.{suffix}", None) for suffix in suffixes)


class Recast(Checkpoint):
    """A checkpoint in which tensors that cannot stand beside packed ones are replaced by those made from them."""

    def __init__(self, skeleton: Skeleton, layers: Iterable[str]) -> None:
        """layers: names of the quantised ones. Raises SpecError when a stack of experts is quantised in part only."""
        self._skeleton = skeleton
        self.folder = skeleton.checkpoint.folder
        self._made: dict[str, str] = {}  # tensor of the output -> parameter
        quantised = {f"{layer}.weight" for layer in layers}
        self._check_whole(quantised)
        replaced = self._replaced(quantised)
        self.entries: dict[str, TensorEntry] = {}
        for key, entry in skeleton.checkpoint.entries.items():
            if key in replaced:
                self.entries.update({name: self._entry(name) for name in replaced[key]})
            else:
                self.entries[key] = entry
        for name in sorted(quantised - set(self._made.values())):
            layer = name.removesuffix(".weight")
            written = f"{output_name(skeleton, layer)}.weight"
            if written not in self.entries:  # a head that shared its weight with the embedding
                self._made[written] = name
                self.entries[written] = self._entry(written)

    def _check_whole(self, quantised: set[str]) -> None:
        parts: dict[str, list[str]] = {}
        for name, view in self._skeleton.slices.items():
            if view.expert is not None:
                parts.setdefault(view.parameter, []).append(name)
        for stack, names in parts.items():
            kept = [name for name in names if name not in quantised]
            if kept and len(kept) < len(names):
                raise SpecError(
                    f"{kept[0].removesuffix('.weight')!r} is kept but other experts of {stack!r} are quantised; "
                    "give all experts of a layer codes, with any bits, or keep them all"
                )

    def _replaced(self, quantised: set[str]) -> dict[str, list[str]]:
        """Tensors of the source that are not written -> what is written in the place of each."""
        skeleton, replaced = self._skeleton, dict[str, list[str]]()
        groups: dict[str, set[str]] = {}  # target of an origin -> parameters of ours that come from it
        for name in skeleton.parameters:
            whole = skeleton.slices[name].parameter if name in skeleton.slices else name
            origin = skeleton.origin(whole)
            if origin is not None:
                groups.setdefault(origin.target, set()).add(name)
        for target, names in groups.items():
            if not any(name in quantised and skeleton.stored_name(name) is None for name in names):
                continue
            origin = skeleton.naming.origins[target]
            replaced.update({key: [] for key, _ in origin.keys})
            for name in sorted(names):
                self._made[name] = name
                replaced[origin.keys[0][0]].append(name)
        return replaced

    def _entry(self, name: str) -> TensorEntry:
        parameter = self._made[name]
        shape = tuple(self._skeleton.parameters[parameter].shape)
        dtype = self._skeleton.checkpoint.entries[self._skeleton.sources(parameter)[0]].dtype
        return TensorEntry(self.folder, dtype, shape, 0, math.prod(shape) * DTYPES[dtype].itemsize)

    def raw(self, name: str) -> bytearray:
        """Return the bytes of a tensor; made ones are computed."""
        if name not in self._made:
            return self._skeleton.checkpoint.raw(name)
        tensor = self._skeleton.weight(self._made[name]).to(DTYPES[self.entries[name].dtype])
        assert tensor.dtype in DTYPE_NAMES
        return bytearray(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
