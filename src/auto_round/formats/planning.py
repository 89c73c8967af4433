"""What an opened model says about itself in the words that writers take: a `Plan`, and what made it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from auto_round.errors import FormatError
from auto_round.formats.base import CodedModel
from auto_round.spec.plan import LayerPlan, Plan

# Keys of a quantization_config that say what made the model, not how it is read.
PROVENANCE = ("autoround_version", "iters", "seed", "dataset", "dataset_sha256")


def plan_of(model: CodedModel) -> Plan:
    """The plan that would give this model: its layers in the order they are stored, and the Linears it keeps.

    Those kept are the 2-D weights inside the blocks, which may hold a few that are no Linear (a router's, say). Raises
    FormatError when no layer has a scheme.
    """
    schemes = Counter(layer.scheme for layer in model.layers.values() if layer.scheme is not None)
    if not schemes:
        kinds = sorted({layer.kind for layer in model.layers.values()})
        raise FormatError(f"{model.path}: its layers are {', '.join(kinds)}, which no other format holds")
    owners = {tensor: layer.name for layer in model.layers.values() for tensor in layer.tensors}
    layers: dict[str, LayerPlan] = {}
    for stored in model.checkpoint:
        name = owners.get(stored) or kept_linear(model, stored)
        if name is None or name in layers:
            continue
        coded = model.layers.get(name)
        if coded is None:
            shape = model.checkpoint.entries[stored].shape
            layers[name] = LayerPlan(name, shape[0], shape[1], None, "kept in the source")
        else:
            layers[name] = LayerPlan(name, coded.out_features, coded.in_features, coded.scheme, "as in the source")
    return Plan(schemes.most_common(1)[0][0], tuple(layers.values()), model.block_lists)


def kept_linear(model: CodedModel, stored: str) -> str | None:
    """The layer whose weight `stored` is, if it is a 2-D weight in a block that was left as it was."""
    inside = stored.startswith(tuple(f"{name}." for name in model.block_lists))
    if not inside or not stored.endswith(".weight") or len(model.checkpoint.entries[stored].shape) != 2:
        return None
    return stored.removesuffix(".weight")


def provenance_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a quantization_config that say what made the model."""
    return {key: settings[key] for key in PROVENANCE if key in settings}
