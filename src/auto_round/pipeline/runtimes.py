"""Which software opens a result: the rules of other readers, as data, asked before any work.

Sources: the loaders of vLLM 0.33 (`inc`, GPTQ, AWQ and WNA16 linear methods), SGLang 0.5.23 and transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from auto_round.spec.fusions import broken_fusions
from auto_round.spec.plan import LayerPlan, Plan

MARLIN_GROUPS = (-1, 32, 64, 128)
GPTQ_LIKE = ("auto_round", "auto_gptq")


@dataclass(frozen=True)
class Reader:
    """Whether one runtime opens one format of a plan: None, or what is in the way."""

    runtime: str
    format: str
    obstacle: str | None


def readers(plan: Plan, format_name: str) -> list[Reader]:
    """Ask every runtime that knows `format_name`."""
    family = format_name.partition(":")[0]
    return [
        Reader(runtime, format_name, rule(plan, family)) for runtime, rule in RULES.items() if family in KNOWN[runtime]
    ]


def _vllm(plan: Plan, family: str) -> str | None:
    if family == "gguf":
        return None
    return next(iter(broken_fusions(plan)), None) or _first(plan, lambda layer: _vllm_layer(layer, plan, family))


def _vllm_layer(layer: LayerPlan, plan: Plan, family: str) -> str | None:
    scheme = layer.scheme
    if scheme is None:
        return None
    if family == "llm_compressor":
        return _ragged(layer)
    if not scheme.sym and (family == "auto_gptq" or not _awq_fits(plan)):
        return f"{scheme.name}: asymmetric codes are read only from 4-bit AWQ tensors"
    if family == "auto_gptq" and scheme.bits not in (4, 8):
        return f"{scheme.name}: GPTQ folders are read at 4 and 8 bits only"
    if scheme.group_size not in MARLIN_GROUPS:
        return f"{scheme.name}: its kernels take group sizes 32, 64, 128 and -1"
    return _ragged(layer)


def _sglang(plan: Plan, family: str) -> str | None:
    return _vllm(plan, family)


def _transformers(plan: Plan, family: str) -> str | None:
    if family == "auto_gptq" and len({layer.scheme for layer in plan.quantised.values()}) > 1:
        return "its GPTQ reader drops the rules of single layers; use --format auto_round for mixed bits"
    return _first(plan, _ragged) if family in ("auto_gptq", "auto_awq") else None


def _ragged(layer: LayerPlan) -> str | None:
    if layer.scheme is not None and layer.in_features % layer.scheme.group_width(layer.in_features):
        return f"{layer.name}: group size {layer.scheme.group_size} does not divide its {layer.in_features} inputs"
    return None


def _awq_fits(plan: Plan) -> bool:
    schemes = [layer.scheme for layer in plan.quantised.values() if layer.scheme is not None]
    return all(scheme.bits == 4 for scheme in schemes) and _first(plan, _ragged) is None


def _first(plan: Plan, rule: Callable[[LayerPlan], str | None]) -> str | None:
    return next((obstacle for layer in plan.quantised.values() if (obstacle := rule(layer))), None)


RULES: dict[str, Callable[[Plan, str], str | None]] = {
    "transformers": _transformers,
    "vLLM": _vllm,
    "SGLang": _sglang,
    "llama.cpp": lambda plan, family: None,
}
KNOWN = {
    "transformers": ("auto_round", "auto_gptq", "auto_awq", "llm_compressor"),
    "vLLM": ("auto_round", "auto_gptq", "auto_awq", "llm_compressor"),
    "SGLang": ("auto_round", "auto_gptq", "auto_awq"),
    "llama.cpp": ("gguf",),
}
