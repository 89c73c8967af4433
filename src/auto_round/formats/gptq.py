"""GPTQ folders: ``quant_method: "gptq"`` with a g_idx in every layer.

auto_gptq   checkpoint_format "gptq" (v1): zero points are stored less 1; what transformers, vLLM and SGLang read
gptq_v2     checkpoint_format "gptq_v2": zero points as they are; gptqmodel and vLLM read it

Layers that differ from the global scheme are named in ``dynamic``: an ordered dict from ``+:regex`` to overrides or
from ``-:regex`` to {} for a layer that is kept; matched from the start of the full name. gptqmodel and vLLM read it,
transformers drops it. Servers ask for a matrix merged of several layers, or for all experts, by its own name.
A quantised head is announced by ``lm_head: true``; transformers does not look for one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from auto_round.formats.base import CodedModel, Export, other_names, takes_the_users
from auto_round.formats.config import GPTQ_V1, LAYOUTS, RAW, CheckpointConfig
from auto_round.formats.folder import folder_sizes, method_of, open_folder, prove_codes, read_settings, write_folder
from auto_round.formats.layouts import GPTQ_RAW_INDEXED, GPTQ_V1_INDEXED
from auto_round.spec.blocks import not_integer
from auto_round.spec.fusions import EXPERT, SERVED_AS
from auto_round.spec.plan import LayerPlan, LinearShape, Plan
from auto_round.spec.scheme import Scheme

CHECKPOINT_FORMATS = {"auto_gptq": "gptq", "gptq_v2": "gptq_v2"}
PACKINGS = {"auto_gptq": GPTQ_V1, "gptq_v2": RAW}


class GptqFormat:
    """Writer and reader of one of the two versions."""

    holds_act_order = True
    holds_conv1d = True
    holds_tokenizer = False

    def __init__(self, name: str) -> None:
        self.name = name
        self._layout = GPTQ_V1_INDEXED if PACKINGS[name] == GPTQ_V1 else GPTQ_RAW_INDEXED

    prescribe = takes_the_users

    def refuse(self, shape: LinearShape, scheme: Scheme) -> str | None:
        """Both dimensions must be multiples of 32."""
        return not_integer(scheme) or self._layout.refuse(scheme, shape.out_features, shape.in_features)

    def check(self, plan: Plan) -> None:
        """Every mix of schemes, and the head, can be said to gptqmodel and vLLM."""

    def sizes(self, export: Export, largest_shard: int | None) -> Mapping[str, int]:
        """The shards and their index."""
        return folder_sizes(export, largest_shard, self._layout)

    def write(self, export: Export, folder: Path, largest_shard: int | None) -> None:
        """Write weights, config.json, quantize_config.json and the source's other files into `folder`."""
        settings = {**self.settings(export.plan), "desc_act": export.act_order, **export.provenance}
        dynamic = settings.get("dynamic", {})
        for name, other in other_names(export).items():
            if (key := f"+:{_exactly(name)}") in dynamic:
                dynamic[f"+:{_exactly(other)}"] = dynamic[key]
        write_folder(export, folder, largest_shard, self._layout, settings, "quantize_config.json")

    def settings(self, plan: Plan) -> dict[str, Any]:
        """The quantization_config of a plan, without provenance."""
        blocks = tuple(f"{name}." for name in plan.block_lists)
        outside = [layer for layer in plan.quantised.values() if not layer.name.startswith(blocks)]
        base = plan.scheme
        config: dict[str, Any] = {
            "quant_method": "gptq",
            "checkpoint_format": CHECKPOINT_FORMATS[self.name],
            "bits": base.bits,
            "group_size": base.group_size,
            "sym": base.sym,
            "desc_act": False,
            "pack_dtype": "int32",
            "lm_head": bool(outside),
            "true_sequential": False,
            "damp_percent": 0.01,
            "provider": "auto-round",
        }
        dynamic = _dynamic(plan, blocks)
        if dynamic:
            config["dynamic"] = dynamic
        # vLLM takes nothing else for quantised once it finds this key, a head neither.
        inner = None if outside else _names_in_every_block(plan, blocks)
        if inner is not None:
            config["modules_in_block_to_quantize"] = [inner]
        return config

    def prove(self, export: Export, folder: Path) -> None:
        """Every layer must read back bit for bit."""
        prove_codes(export, self._open(folder))

    def open(self, path: Path, scratch: Path) -> CodedModel | None:
        """Open folders of this version, with or without act-order."""
        if method_of(path) not in ("gptq", "gptqmodel"):
            return None
        return (
            self._open(path) if CheckpointConfig.parse(read_settings(path)[1]).packing == PACKINGS[self.name] else None
        )

    def _open(self, folder: Path) -> CodedModel:
        config = CheckpointConfig.parse(read_settings(folder)[1])
        detail = f"checkpoint_format {CHECKPOINT_FORMATS[self.name]}{', act-order' if config.act_order else ''}"
        layout = self._layout if config.act_order else LAYOUTS[config.packing]
        return open_folder(folder, format=self.name, detail=detail, layout=layout, rules=config, blocks=config.blocks)


def _dynamic(plan: Plan, blocks: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """An entry for each name that needs one: anchored at both ends, so that it is found in no longer name.

    Those of layers first, then those of what servers merge from several layers, where all of them have the same.
    """
    rules = {layer.name: rule for layer in plan.layers if (rule := _rule(layer, plan, blocks)) is not None}
    for merged, members in _merged(plan).items():
        rule = rules.get(members[0])
        if rule is not None and len(members) > 1 and all(rules.get(name) == rule for name in members):
            rules[merged] = rule
    return {f"{sign}:{_exactly(name)}": values for name, (sign, values) in rules.items()}


def _rule(layer: LayerPlan, plan: Plan, blocks: tuple[str, ...]) -> tuple[str, dict[str, Any]] | None:
    """Sign and values of the entry that a layer needs, if any."""
    inside = layer.name.startswith(blocks)
    if layer.scheme is None:
        return ("-", {}) if inside else None
    if layer.scheme == plan.scheme and inside:
        return None
    scheme = layer.scheme
    return "+", {"bits": scheme.bits, "group_size": scheme.group_size, "sym": scheme.sym}


def _merged(plan: Plan) -> dict[str, list[str]]:
    """Names of what servers merge -> the layers that it comes from."""
    found: dict[str, list[str]] = {}
    for layer in plan.layers:
        parent, _, own = layer.name.rpartition(".")
        if expert := EXPERT.match(layer.name):
            names = [expert[1]]
        else:
            names = [f"{parent}.{name}" for parts, merged in SERVED_AS.items() if own in parts for name in merged]
        for name in names:
            found.setdefault(name, []).append(layer.name)
    return found


def _exactly(name: str) -> str:
    return f"^{re.escape(name)}$"


def _names_in_every_block(plan: Plan, blocks: tuple[str, ...]) -> list[str] | None:
    """Names inside a block that are quantised, when blocks keep some and all keep the same: transformers' own way.

    None when nothing is kept, or when blocks differ, which that key cannot say.
    """
    inner: dict[str, set[bool]] = {}
    for layer in plan.layers:
        if layer.name.startswith(blocks):
            own = re.sub(r"^\d+\.", "", layer.name.removeprefix(next(b for b in blocks if layer.name.startswith(b))))
            inner.setdefault(own, set()).add(layer.scheme is not None)
    if any(len(kinds) > 1 for kinds in inner.values()) or all(True in kinds for kinds in inner.values()):
        return None
    return [name for name, kinds in inner.items() if True in kinds]


GPTQ = GptqFormat("auto_gptq")
GPTQ_V2 = GptqFormat("gptq_v2")
