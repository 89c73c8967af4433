"""Layers that runtimes such as vLLM and SGLang merge into one, and which must therefore have one scheme."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType

from auto_round.spec.plan import LayerPlan, Plan

# Names of layers beside one another that are merged, as the checkpoints of various families call them -> what vLLM or
# SGLang call the matrix, where that is known.
SERVED_AS: Mapping[tuple[str, ...], tuple[str, ...]] = MappingProxyType(
    {
        ("q_proj", "k_proj", "v_proj"): ("qkv_proj",),
        ("query", "key", "value"): ("qkv_proj",),
        ("wq", "wk", "wv"): (),
        ("gate_proj", "up_proj"): ("gate_up_proj",),
        ("w1", "w3"): ("gate_up_proj",),
        ("in_proj_qkv", "in_proj_z"): ("in_proj_qkvz",),
        ("in_proj_b", "in_proj_a"): ("in_proj_ba",),
        ("q_a_proj", "kv_a_proj_with_mqa"): ("fused_qkv_a_proj", "fused_qkv_a_proj_with_mqa"),
    }
)
MERGED = tuple(SERVED_AS)
EXPERT = re.compile(r"(.*\.experts)\.\d+\.")


def broken_fusions(plan: Plan) -> list[str]:
    """Describe every set of layers that a runtime merges but whose schemes differ in `plan`, one sentence each."""
    return [_sentence(place, layers) for place, layers in _sets(plan) if len({layer.scheme for layer in layers}) > 1]


def _sets(plan: Plan) -> Iterator[tuple[str, list[LayerPlan]]]:
    beside: dict[str, dict[str, LayerPlan]] = {}
    experts: dict[str, list[LayerPlan]] = {}
    for layer in plan.layers:
        parent, _, own = layer.name.rpartition(".")
        beside.setdefault(parent, {})[own] = layer
        match = EXPERT.match(layer.name)
        if match:
            experts.setdefault(match[1], []).append(layer)
    yield from experts.items()
    for parent, layers in beside.items():
        if EXPERT.match(parent + "."):
            continue
        for names in MERGED:
            found = [layers[name] for name in names if name in layers]
            if len(found) > 1:
                yield parent, found


def _sentence(place: str, layers: list[LayerPlan]) -> str:
    by_scheme: dict[str, list[str]] = {}
    for layer in layers:
        scheme = layer.scheme.name if layer.scheme else "kept"
        by_scheme.setdefault(scheme, []).append(layer.name.removeprefix(place + "."))
    parts = [f"{', '.join(names[:3])}{', ...' if names[3:] else ''} {scheme}" for scheme, names in by_scheme.items()]
    return f"{place}: {'; '.join(parts)} are loaded as one matrix by vLLM and SGLang and must be alike"
