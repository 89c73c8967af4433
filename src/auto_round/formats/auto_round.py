"""The auto_round format: config.json with ``quant_method: "auto-round"`` beside safetensors in a GPTQ or AWQ layout.

packing_format            layout                               written for
auto_round:auto_gptq      GPTQ v1 without g_idx                symmetric schemes
auto_round:auto_awq       AWQ gemm                             4 bits asymmetric throughout, groups dividing all inputs
auto_round                GPTQ shapes, raw zero points         other asymmetric schemes

Tensors of the source that are not quantised keep their names and bytes; a quantised ``<layer>.weight`` becomes
``<layer>.qweight``, ``.qzeros`` and ``.scales``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from auto_round.errors import FormatError
from auto_round.formats.base import Export
from auto_round.formats.layouts import AWQ, GPTQ_RAW, GPTQ_V1, Layout
from auto_round.formats.shards import Piece, copied, encoded, write_shards
from auto_round.qtensor import QTensor
from auto_round.source.checkpoint import Checkpoint
from auto_round.spec.plan import LayerPlan, LinearShape, Plan
from auto_round.spec.scheme import Scheme

LAYOUTS: dict[str, Layout] = {
    "auto_round:auto_gptq": GPTQ_V1,
    "auto_round:auto_awq": AWQ,
    "auto_round": GPTQ_RAW,
}


def packing_for(plan: Plan) -> str:
    """The packing that serves most readers for a plan's schemes; see the table at the top of this file."""
    layers = plan.quantised.values()
    if all(layer.scheme is not None and layer.scheme.sym for layer in layers):
        return "auto_round:auto_gptq"
    if all(AWQ.refuse(_scheme(layer), layer.out_features, layer.in_features) is None for layer in layers):
        return "auto_round:auto_awq"
    return "auto_round"


def _scheme(layer: LayerPlan) -> Scheme:
    if layer.scheme is None:
        raise FormatError(f"layer {layer.name!r} is kept and has no scheme")
    return layer.scheme


def quantization_config(plan: Plan, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The dict that goes into config.json: keys that transformers, vLLM and SGLang read, then provenance.

    Every Linear that differs from the global scheme is named in full, kept ones with 16 bits, since readers disagree
    about patterns.
    """
    base = plan.scheme
    extra: dict[str, dict[str, Any]] = {}
    blocks = tuple(name + "." for name in plan.block_lists)
    for layer in plan.layers:
        inside = layer.name.startswith(blocks)
        if layer.scheme is None:
            if inside:
                extra[layer.name] = {"bits": 16, "data_type": "float"}
        elif layer.scheme != base or not inside:
            scheme = layer.scheme
            extra[layer.name] = {
                "bits": scheme.bits,
                "group_size": scheme.group_size,
                "sym": scheme.sym,
                "data_type": "int",
            }
    config: dict[str, Any] = {
        "quant_method": "auto-round",
        "packing_format": packing_for(plan),
        "bits": base.bits,
        "group_size": base.group_size,
        "sym": base.sym,
        "data_type": "int",
        "block_name_to_quantize": ",".join(plan.block_lists),
    }
    if extra:
        config["extra_config"] = extra
    return {**config, **provenance}


class AutoRoundFormat:
    """Writer and reader of the format."""

    name = "auto_round"

    def refuse(self, shape: LinearShape, scheme: Scheme) -> str | None:
        """The GPTQ layouts hold every scheme as long as both dimensions are multiples of 32."""
        return GPTQ_RAW.refuse(scheme, shape.out_features, shape.in_features)

    def write(self, export: Export, folder: Path, largest_shard: int) -> None:
        """Write weights, config.json, quantization_config.json and the source's other files into `folder`."""
        config = quantization_config(export.plan, export.provenance)
        layout = LAYOUTS[config["packing_format"]]
        write_shards(folder, list(_pieces(export, layout)), largest_shard)
        for file in export.extra:
            shutil.copyfile(file, folder / file.name)
        _write_json(folder / "quantization_config.json", config)
        _write_json(folder / "config.json", {**export.config, "quantization_config": config})

    def read(self, folder: Path) -> Iterator[tuple[str, QTensor]]:
        """Yield the layers that `write` recorded, exactly."""
        config = json.loads((folder / "quantization_config.json").read_text(encoding="utf-8"))
        layout = LAYOUTS[config["packing_format"]]
        checkpoint = Checkpoint(folder)
        base = Scheme(config["bits"], config["group_size"], config["sym"])
        overrides = config.get("extra_config", {})
        for stored in checkpoint:
            if not stored.endswith(".qweight"):
                continue
            prefix = stored.removesuffix(".qweight")
            scheme = base.updated({k: v for k, v in overrides.get(prefix, {}).items() if k != "data_type"})
            tensors = {suffix: checkpoint.tensor(f"{prefix}.{suffix}") for suffix in ("qweight", "qzeros", "scales")}
            yield prefix, layout.decode(tensors, scheme, _in_features(layout, tensors["qweight"].shape, scheme))


def _in_features(layout: Layout, shape: tuple[int, ...], scheme: Scheme) -> int:
    return shape[0] if layout is AWQ else shape[0] * 32 // scheme.bits


def _pieces(export: Export, layout: Layout) -> Iterator[Piece]:
    """The output's tensors in the source's order, each quantised weight replaced by its packed tensors."""
    replaced = {export.stored_names[name]: layer for name, layer in export.plan.quantised.items()}
    for stored in export.checkpoint:
        layer = replaced.get(stored)
        if layer is None:
            yield copied(export.checkpoint, stored)
            continue
        specs = layout.specs(_scheme(layer), layer.out_features, layer.in_features)
        prefix = stored.removesuffix(".weight")
        yield encoded(prefix, specs, lambda name=layer.name: layout.encode(export.tensor(name)))  # type: ignore[misc]


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


FORMAT = AutoRoundFormat()
