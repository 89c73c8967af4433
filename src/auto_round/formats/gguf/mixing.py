"""Which block type each tensor of a file gets: the mixes that llama.cpp's own quantiser calls Q4_K_M and the like.

Most tensors have the file's main type. Some suffer more than others and get a better one; a type whose block does not
divide a row gives way to a smaller block. Names are those of GGUF tensors; i is the layer, n the number of layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from auto_round.spec.blocks import BLOCK_SCHEMES, BlockScheme

# Label of the file, `general.file_type`, and the type most tensors have; None keeps all in floats.
FILE_TYPES: Mapping[str, tuple[int, str | None]] = MappingProxyType(
    {
        "q4_0": (2, "q4_0"),
        "q4_1": (3, "q4_1"),
        "q8_0": (7, "q8_0"),
        "q5_0": (8, "q5_0"),
        "q5_1": (9, "q5_1"),
        "q2_k": (10, "q2_k"),
        "q3_k_s": (11, "q3_k"),
        "q3_k_m": (12, "q3_k"),
        "q3_k_l": (13, "q3_k"),
        "q4_k_s": (14, "q4_k"),
        "q4_k_m": (15, "q4_k"),
        "q5_k_s": (16, "q5_k"),
        "q5_k_m": (17, "q5_k"),
        "q6_k": (18, "q6_k"),
        "q2_k_s": (21, "q2_k"),
        "bf16": (32, None),
    }
)
# What a type gives way to in rows that are no multiple of 256.
SMALLER_BLOCK = MappingProxyType({"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"})
EIGHT_EXPERTS = 8  # Mixtral's number, for which attention tensors are few beside the experts
LARGE_LAYERS = 80  # llama.cpp's mark of a 70B model


@dataclass(frozen=True)
class Shape:
    """What the rules ask of a model: layers, query heads per key head, experts (0 in dense models)."""

    layers: int
    heads_per_group: int
    experts: int


Rule = Callable[[int, int], str]


def _early(share: int, better: str, other: str) -> Rule:
    return lambda i, n: better if i < n // share else other


def _first(count: int, better: str, other: str) -> Rule:
    return lambda i, n: better if i < count else other


def _spread(better: str, other: str) -> Rule:
    """The first and last eighth of the layers, and every third between."""
    return lambda i, n: better if i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2 else other


def _always(name: str) -> Rule:
    return lambda i, n: name


# File type -> tensor -> rule. "attn_v" stands for fused query-key-value tensors too.
RULES: Mapping[str, Mapping[str, Rule]] = MappingProxyType(
    {
        "q2_k": {"attn_v": _always("q3_k"), "ffn_down": _always("q3_k"), "attn_output": _always("q3_k")},
        "q2_k_s": {"ffn_down": _early(8, "q4_k", "q2_k")},
        "q3_k_m": {
            "attn_v": _first(2, "q5_k", "q4_k"),
            "ffn_down": _early(16, "q5_k", "q4_k"),
            "attn_output": _always("q4_k"),
        },
        "q3_k_l": {"attn_v": _always("q5_k"), "ffn_down": _always("q5_k"), "attn_output": _always("q5_k")},
        "q4_k_s": {"attn_v": _first(4, "q5_k", "q4_k"), "ffn_down": _early(8, "q5_k", "q4_k")},
        "q4_k_m": {"attn_v": _spread("q6_k", "q4_k"), "ffn_down": _spread("q6_k", "q4_k")},
        "q5_k_m": {"attn_v": _spread("q6_k", "q5_k"), "ffn_down": _spread("q6_k", "q5_k")},
    }
)
# File types in which the attention output of a model of eight experts is better than the rest.
BETTER_OUTPUT = ("q2_k", "q3_k_s", "q3_k_m", "q4_k_s", "q4_k_m")


def layer_type(file_type: str, tensor: str, in_features: int, shape: Shape) -> BlockScheme | None:
    """Type of a Linear of the blocks; None when no block divides its rows, so that it stays in floats.

    tensor: its GGUF name, such as blk.3.attn_v.weight.
    """
    _, layer, kind = tensor.split(".")[:3]
    kind = (
        "attn_v" if kind in ("attn_v", "attn_qkv", "attn_kv_b") else kind.removesuffix("_exps").removesuffix("_shexp")
    )
    main = FILE_TYPES[file_type][1]
    if main is None:
        return None
    rule = RULES.get(file_type, {}).get(kind)
    name = rule(int(layer), shape.layers) if rule else main
    if kind == "attn_v":
        if main == "q2_k" and shape.heads_per_group >= 4:
            name = "q4_k"
        if shape.layers == LARGE_LAYERS and shape.heads_per_group > 1 and name in ("q3_k", "q4_k"):
            name = "q5_k"
    if shape.experts == EIGHT_EXPERTS:
        name = _beside_experts(file_type, kind, name)
    return fitting(name, in_features)


def _beside_experts(file_type: str, kind: str, name: str) -> str:
    if kind in ("attn_v", "attn_k"):
        return "q8_0"
    return "q5_k" if kind == "attn_output" and file_type in BETTER_OUTPUT else name


def output_type(file_type: str, in_features: int) -> BlockScheme | None:
    """Type of the output head, and of the embedding when it is the head as well."""
    main = FILE_TYPES[file_type][1]
    if main is None:
        return None
    if in_features % BLOCK_SCHEMES[main].size or main == "q8_0":
        return fitting("q8_0", in_features)
    return fitting("q6_k", in_features)


def embedding_type(file_type: str, in_features: int, *, tied: bool) -> BlockScheme | None:
    """Type of the token embedding."""
    main = FILE_TYPES[file_type][1]
    if main is None or tied:
        return output_type(file_type, in_features)
    return fitting(main, in_features)


def fitting(name: str, in_features: int) -> BlockScheme | None:
    """The type called `name`, or the one it gives way to; None when not even 32 divides the row."""
    if in_features % BLOCK_SCHEMES[name].size:
        name = SMALLER_BLOCK.get(name, name)
    return None if in_features % BLOCK_SCHEMES[name].size else BLOCK_SCHEMES[name]
