"""Named recipes and schemes, as data. A new preset is a new row."""

from __future__ import annotations

from types import MappingProxyType

from auto_round.errors import SpecError
from auto_round.registry import did_you_mean
from auto_round.spec.recipe import Recipe
from auto_round.spec.scheme import Scheme

RECIPES = MappingProxyType(
    {
        "default": Recipe(),
        "best": Recipe(nsamples=512, iters=400, finish_iters=128),
        "light": Recipe(iters=50),
        "rtn": Recipe(iters=0, start="plain", nsamples=1, heldout=0.0),
    }
)

SCHEMES = MappingProxyType(
    {
        f"W{bits}A16{group}": Scheme(bits, size)
        for bits in (2, 3, 4, 8)
        for group, size in (("", 128), ("G32", 32), ("G64", 64), ("G128", 128), ("G-1", -1))
    }
)


def recipe(name: str) -> Recipe:
    """Return the recipe called `name`; raise SpecError with the nearest names if there is none."""
    if name not in RECIPES:
        raise SpecError(f"unknown recipe {name!r}. {did_you_mean(name, list(RECIPES))}")
    return RECIPES[name]
