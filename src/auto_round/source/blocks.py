"""Blocks are found in the module tree: the outermost list of modules that holds most of the Linear weights."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from auto_round.errors import SourceError
from auto_round.source.quirks import quirk


def is_linear(module: nn.Module) -> bool:
    """True for a module that computes x @ W^T + b and nothing else."""
    return type(module) is nn.Linear or (isinstance(module, nn.Linear) and _name(module) in quirk("classes", "linear"))


def _name(module: nn.Module) -> str:
    return type(module).__name__


def linear_weights(module: nn.Module) -> int:
    """Count the weights of all Linears in `module` (also on the meta device)."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


def find_block_lists(model: nn.Module) -> list[str]:
    """Return the name of the module list whose entries are the blocks, such as ["model.layers"].

    A candidate is a ModuleList with Linears in it that lies in no other candidate; the heaviest one is the decoder.
    In a model with vision or audio beside text, only what lies in its text model counts.
    Raises SourceError when the model has none.
    """
    weights: dict[str, int] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(outer + ".") for outer in weights)
        if isinstance(module, nn.ModuleList) and not inside and linear_weights(module):
            weights[name] = linear_weights(module)
    text = text_names(model, weights)
    weights = {name: count for name, count in weights.items() if name in text} or weights
    if not weights:
        raise SourceError(f"{type(model).__name__} holds no list of blocks with Linear layers, so nothing can be tuned")
    return [max(weights, key=lambda name: weights[name])]


def text_names(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Those of `names` (of modules) that lie in the text model: all of them unless the model has other parts."""
    decoder = getattr(model, "get_decoder", lambda: model)()  # transformers' models
    prefix = next((f"{name}." for name, module in model.named_modules() if module is decoder and name), "")
    other = [re.compile(pattern) for pattern in quirk("names", "nontext")]
    return {name for name in names if name.startswith(prefix) and not any(p.search(name) for p in other)}


def block_names(model: nn.Module, block_lists: list[str]) -> list[str]:
    """Return the full names of all blocks in the order in which the model runs them."""
    return [f"{name}.{i}" for name in block_lists for i, _ in enumerate(model.get_submodule(name).children())]


def linears_in(module: nn.Module, prefix: str = "") -> dict[str, nn.Linear]:
    """Return the Linears of `module` by name, each name with `prefix` in front."""
    return {prefix + name: m for name, m in module.named_modules() if isinstance(m, nn.Linear) and is_linear(m)}


def kept_by_default(block: nn.Module, prefix: str = "") -> dict[str, str]:
    """Linears in `block` that stay as they are unless a rule names them, with the reason.

    Routers and gates of experts have few outputs, on which all else depends.
    """
    found = {prefix + name: "the model reads its weight directly" for name in _matching(block, "read_directly")}
    found.update({prefix + name: "it weighs the block's streams" for name in _matching(block, "steering")})
    if any("expert" in f"{name} {_name(module)}".lower() for name, module in block.named_modules()):
        found.update({prefix + name: "chooses experts" for name in _matching(block, "routers")})
    return found


def routers_in(block: nn.Module, prefix: str = "") -> list[str]:
    """Modules of `block` that choose experts by a weight (experts, hidden) and are no Linears here; some readers make
    Linears of them."""
    weights = {name: getattr(module, "weight", None) for name, module in block.named_modules() if not is_linear(module)}
    matrices = [name for name, weight in weights.items() if isinstance(weight, nn.Parameter) and weight.dim() == 2]
    return [prefix + name for name in _among(matrices, "routers")]


def _matching(block: nn.Module, kind: str) -> list[str]:
    return _among(linears_in(block), kind)


def _among(names: Iterable[str], kind: str) -> list[str]:
    patterns = [re.compile(pattern) for pattern in quirk("names", kind)]
    return [name for name in names if any(pattern.search(name) for pattern in patterns)]
