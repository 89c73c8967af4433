"""Which software opens a quantised folder, and what is in the way: the rules of other readers, as data.

Read from the loaders of transformers 5.23, gptqmodel 7.7, vLLM 0.33, SGLang 0.5.23 and Intel's auto-round 0.16.1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from auto_round.spec.fusions import EXPERT, broken_fusions
from auto_round.spec.plan import LayerPlan, Plan

MARLIN_GROUPS = (-1, 32, 64, 128)
GPTQMODEL_GROUPS = (-1, 16, 32, 64, 128, 256, 512, 1024)
AWQ_PACKINGS = ("auto_round:auto_awq", "auto_round:awq")
EXPERT_PARTS = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")  # as checkpoints of single experts call them
SERVED_PACKINGS = ("auto_round:auto_gptq", *AWQ_PACKINGS)


@dataclass(frozen=True)
class Held:
    """A quantised model as its readers see it, or will see it. settings: its quantization_config."""

    plan: Plan
    format: str
    settings: Mapping[str, Any]
    act_order: bool = False

    @property
    def packing(self) -> str:
        """How an auto_round folder says that its tensors lie; "" in others."""
        return str(self.settings.get("packing_format") or "")

    @property
    def awq(self) -> bool:
        """True when its tensors lie as AWQ's do."""
        return self.format == "auto_awq" or self.packing in AWQ_PACKINGS


Rule = Callable[[Held], str | None]


def clients(held: Held) -> dict[str, str | None]:
    """For every client that knows the format: what is in the way of opening it, or None."""
    family = held.format.partition(":")[0]
    return {name: rule(held) for name, (formats, rule) in CLIENTS.items() if family in formats}


def _first(held: Held, rule: Callable[[LayerPlan], str | None]) -> str | None:
    return next((found for layer in held.plan.quantised.values() if (found := rule(layer))), None)


def _ragged(layer: LayerPlan) -> str | None:
    if layer.scheme is not None and not layer.scheme.divides(layer.in_features):
        return f"{layer.name}: group size {layer.scheme.group_size} does not divide its {layer.in_features} inputs"
    return None


def _ours(held: Held) -> str | None:
    """Transformers parses the config before this package sees it."""
    method = held.settings.get("quant_method")
    if held.format == "auto_round" and method != "auto-round":
        return f"transformers does not know quant_method {method!r}; convert it to auto_round"
    if "meta" in held.settings and method == "gptq":
        return 'transformers\' AutoRoundConfig refuses GPTQ configs with a "meta" entry; convert it to auto_round'
    return None


def _experts(held: Held) -> str | None:
    """Transformers 5 keeps a layer's experts in one tensor; readers that replace Linears alone cannot fill it."""
    expert = next((name for name in held.plan.quantised if EXPERT.match(name)), None)
    return f"{expert}: it keeps experts in one tensor, which this reader cannot fill" if expert else None


def _transformers(held: Held) -> str | None:
    if held.format != "auto_gptq":
        return _experts(held)
    blocks = tuple(f"{name}." for name in held.plan.block_lists)
    outside = [name for name in held.plan.quantised if not name.startswith(blocks)]
    if outside:
        return f"{outside[0]}: its GPTQ reader converts the blocks only"
    if len({layer.scheme for layer in held.plan.quantised.values()}) > 1:
        return "its GPTQ reader drops the rules of single layers"
    return _experts(held) or _gptqmodel(held)


def _compressed(held: Held) -> str | None:
    def packed(layer: LayerPlan) -> str | None:
        if layer.scheme is None or layer.scheme.sym:
            return _ragged(layer)
        return f"{layer.name}: asymmetric files need CompressedTensorsConfig(dequantize=True), a fault of 0.18 to 0.20"

    expert = _experts(held)
    schemes = {layer.scheme for layer in held.plan.quantised.values() if layer.scheme}
    if len(schemes) > 1 and (expert or not all(scheme.sym for scheme in schemes)):
        return "experts and asymmetric layers need dequantize=True, by which it reads all layers as of one scheme"
    return f"{expert} without CompressedTensorsConfig(dequantize=True)" if expert else _first(held, packed)


def _stacked(held: Held) -> str | None:
    """Experts that checkpoints keep in one stack have names of ours as single ones."""
    experts = (name for name in held.plan.quantised if EXPERT.match(name))
    name = next((name for name in experts if name.rpartition(".")[2] not in EXPERT_PARTS), None)
    return f"{name}: this model stores its experts in one stack, and it looks for them by other names" if name else None


def _gptqmodel(held: Held) -> str | None:
    def group(layer: LayerPlan) -> str | None:
        size = layer.scheme.group_size if layer.scheme else -1
        if size in GPTQMODEL_GROUPS or size == layer.in_features:
            return None
        return f"{layer.name}: its kernels take groups of {', '.join(map(str, GPTQMODEL_GROUPS))}, not {size}"

    return _stacked(held) or _first(held, group)


def _intel(held: Held) -> str | None:
    if held.act_order:
        return "it does not read act-order"
    if held.format == "gptq_v2":
        return "it reads GPTQ v1 only"
    ragged = _first(held, _ragged)
    return f"{ragged}: it would load random weights for that layer" if ragged else _experts(held)


def _server(held: Held) -> str | None:
    """VLLM and SGLang load int weights by the same rules."""
    if held.act_order:
        return "it does not read act-order"
    if held.format == "auto_round" and held.packing not in SERVED_PACKINGS:
        return f"it does not read packing {held.packing!r}"
    return (
        _stacked(held)
        or next(iter(broken_fusions(held.plan)), None)
        or _first(held, lambda layer: _served(held, layer) or _ragged(layer))
    )


def _served(held: Held, layer: LayerPlan) -> str | None:
    scheme = layer.scheme
    if scheme is None or held.format == "llm_compressor":
        return None
    if not scheme.sym and not held.awq:
        return f"{scheme.name}: it reads asymmetric codes from AWQ tensors only"
    if held.format in ("auto_gptq", "gptq_v2") and scheme.bits not in (4, 8):
        return f"{scheme.name}: it reads GPTQ folders of 4 and 8 bits only"
    if scheme.group_size not in MARLIN_GROUPS:
        return f"{scheme.name}: its kernels take groups of {', '.join(map(str, MARLIN_GROUPS))}"
    return None


def _nothing(held: Held) -> None:
    """Nothing is in the way."""


CLIENTS: dict[str, tuple[tuple[str, ...], Rule]] = {
    "transformers with this package": (("auto_round", "auto_gptq", "gptq_v2", "auto_awq"), _ours),
    "transformers with gptqmodel": (("auto_gptq", "auto_awq"), _transformers),
    "transformers with compressed-tensors": (("llm_compressor",), _compressed),
    "gptqmodel": (("auto_gptq", "gptq_v2", "auto_awq"), _gptqmodel),
    "Intel's auto-round": (("auto_round", "auto_gptq", "gptq_v2", "auto_awq"), _intel),
    "vLLM": (("auto_round", "auto_gptq", "gptq_v2", "auto_awq", "llm_compressor"), _server),
    "SGLang": (("auto_round", "auto_gptq", "auto_awq"), _server),
    "llama.cpp": (("gguf",), _nothing),
    "transformers": (("fake",), _nothing),
}
