"""Blocks are found in the module tree: the outermost list of modules that holds most of the Linear weights."""

from __future__ import annotations

from torch import nn

from auto_round.errors import SourceError


def linear_weights(module: nn.Module) -> int:
    """Count the weights of all Linears in `module` (also on the meta device)."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


def find_block_lists(model: nn.Module) -> list[str]:
    """Return the name of the module list whose entries are the blocks, such as ["model.layers"].

    A candidate is a ModuleList with Linears in it that lies in no other candidate; the heaviest one is the decoder.
    Raises SourceError when the model has none.
    """
    weights: dict[str, int] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(outer + ".") for outer in weights)
        if isinstance(module, nn.ModuleList) and not inside and linear_weights(module):
            weights[name] = linear_weights(module)
    if not weights:
        raise SourceError(f"{type(model).__name__} holds no list of blocks with Linear layers, so nothing can be tuned")
    return [max(weights, key=lambda name: weights[name])]


def block_names(model: nn.Module, block_lists: list[str]) -> list[str]:
    """Return the full names of all blocks in the order in which the model runs them."""
    return [f"{name}.{i}" for name in block_lists for i, _ in enumerate(model.get_submodule(name).children())]


def linears_in(module: nn.Module, prefix: str = "") -> dict[str, nn.Linear]:
    """Return the Linears of `module` by name, each name with `prefix` in front. Subclasses are left out."""
    return {prefix + name: m for name, m in module.named_modules() if type(m) is nn.Linear}
