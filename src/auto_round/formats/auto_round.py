"""The auto_round format: config.json with ``quant_method: "auto-round"`` beside safetensors in a GPTQ or AWQ layout.

packing_format            layout                               written for
auto_round:auto_gptq      GPTQ v1 without g_idx                symmetric schemes
auto_round:auto_awq       AWQ gemm                             4 bits asymmetric throughout, groups dividing all inputs
auto_round                GPTQ shapes, raw zero points         other asymmetric schemes

Tensors of the source that are not quantised keep their names and bytes; a quantised ``<layer>.weight`` becomes
``<layer>.qweight``, ``.qzeros`` and ``.scales``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from auto_round.formats.base import CodedModel, Export, other_names, takes_the_users
from auto_round.formats.config import LAYOUTS, CheckpointConfig
from auto_round.formats.folder import folder_sizes, method_of, open_folder, prove_codes, read_settings, write_folder
from auto_round.formats.layouts import AWQ, GPTQ_RAW
from auto_round.spec.blocks import not_integer
from auto_round.spec.plan import LinearShape, Plan
from auto_round.spec.scheme import Scheme

METHODS = ("auto-round", "intel/auto-round")  # the second is that of the first releases; transformers refuses it


def packing_for(plan: Plan) -> str:
    """The packing that serves most readers for a plan's schemes; see the table at the top of this file."""
    shapes = [(layer.scheme, layer.out_features, layer.in_features) for layer in plan.quantised.values()]
    if all(scheme is not None and scheme.sym for scheme, *_ in shapes):
        return "auto_round:auto_gptq"
    if all(scheme is not None and AWQ.refuse(scheme, *shape) is None for scheme, *shape in shapes):
        return "auto_round:auto_awq"
    return "auto_round"


def quantization_config(plan: Plan, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The dict that goes into config.json: keys that transformers, vLLM and SGLang read, then provenance."""
    layers = {**{layer.name: layer.scheme for layer in plan.layers}, **dict.fromkeys(plan.routers)}
    return {**settings(packing_for(plan), plan.scheme, layers, plan.block_lists), **provenance}


def settings(packing: str, base: Scheme, layers: Mapping[str, Scheme | None], blocks: Iterable[str]) -> dict[str, Any]:
    """The keys that decide how a folder is read.

    Every Linear that differs from the global scheme is named in full, kept ones with 16 bits, since readers disagree
    about patterns.
    """
    extra: dict[str, dict[str, Any]] = {}
    prefixes = tuple(f"{name}." for name in blocks)
    for name, scheme in layers.items():
        inside = name.startswith(prefixes)
        if scheme is None:
            if inside:
                extra[name] = {"bits": 16, "data_type": "float"}
        elif scheme != base or not inside:
            extra[name] = {
                "bits": scheme.bits,
                "group_size": scheme.group_size,
                "sym": scheme.sym,
                "data_type": "int",
            }
    config: dict[str, Any] = {
        "quant_method": "auto-round",
        "packing_format": packing,
        "bits": base.bits,
        "group_size": base.group_size,
        "sym": base.sym,
        "data_type": "int",
        "block_name_to_quantize": ",".join(blocks),
    }
    return {**config, "extra_config": extra} if extra else config


class AutoRoundFormat:
    """Writer and reader of the format."""

    name = "auto_round"
    holds_act_order = False
    holds_conv1d = True
    holds_tokenizer = False
    prescribe = takes_the_users

    def refuse(self, shape: LinearShape, scheme: Scheme) -> str | None:
        """The GPTQ layouts hold every scheme as long as both dimensions are multiples of 32."""
        return not_integer(scheme) or GPTQ_RAW.refuse(scheme, shape.out_features, shape.in_features)

    def check(self, plan: Plan) -> None:
        """Every mix of schemes, and the head, can be said."""

    def settings(self, plan: Plan) -> Mapping[str, Any]:
        """The quantization_config of a plan, without provenance."""
        return quantization_config(plan, {})

    def sizes(self, export: Export, largest_shard: int | None) -> Mapping[str, int]:
        """The shards and their index."""
        return folder_sizes(export, largest_shard, LAYOUTS[packing_for(export.plan)])

    def write(self, export: Export, folder: Path, largest_shard: int | None) -> None:
        """Write weights, config.json, quantization_config.json and the source's other files into `folder`."""
        config = quantization_config(export.plan, export.provenance)
        extra = config.get("extra_config", {})
        extra.update({other: extra[name] for name, other in other_names(export).items() if name in extra})
        layout = LAYOUTS[config["packing_format"]]
        write_folder(export, folder, largest_shard, layout, config, "quantization_config.json")

    def prove(self, export: Export, folder: Path) -> None:
        """Every layer must read back bit for bit."""
        prove_codes(export, self._open(folder))

    def open(self, path: Path, scratch: Path) -> CodedModel | None:
        """Open folders of every packing, of our and of older writers."""
        return self._open(path) if method_of(path) in METHODS else None

    def _open(self, folder: Path) -> CodedModel:
        given = read_settings(folder)[1]
        config = CheckpointConfig.parse(given)
        detail = f"packing {given.get('packing_format') or given.get('backend') or config.packing}"
        layout = config.layout if config.act_order else LAYOUTS[config.packing]
        return open_folder(folder, format=self.name, detail=detail, layout=layout, rules=config, blocks=config.blocks)


FORMAT = AutoRoundFormat()
