"""The plan: for every Linear of a model its scheme or "keep", and why. Rules are resolved once, before any work."""

from __future__ import annotations

import difflib
import fnmatch
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from auto_round.errors import SpecError
from auto_round.spec.blocks import BlockScheme, parse_scheme
from auto_round.spec.scheme import Scheme

Rule = str | Mapping[str, Any] | Scheme | None


@dataclass(frozen=True)
class LinearShape:
    """A Linear of the model: full module name, [out_features, in_features]."""

    name: str
    out_features: int
    in_features: int


@dataclass(frozen=True)
class LayerPlan:
    """What happens to one Linear: its scheme, or None to keep it as it is, and why."""

    name: str
    out_features: int
    in_features: int
    scheme: Scheme | None
    reason: str


@dataclass(frozen=True)
class Plan:
    """The whole model: the scheme most layers have, the layers in module order, the names of the block lists.

    routers: names of modules in the blocks that are no Linears here but for some readers, which have to be told.
    """

    scheme: Scheme
    layers: tuple[LayerPlan, ...]
    block_lists: tuple[str, ...]
    routers: tuple[str, ...] = ()

    @property
    def quantised(self) -> dict[str, LayerPlan]:
        """The layers that get codes, by name."""
        return {layer.name: layer for layer in self.layers if layer.scheme is not None}

    @property
    def kept(self) -> dict[str, LayerPlan]:
        """The layers that stay as they are, by name."""
        return {layer.name: layer for layer in self.layers if layer.scheme is None}

    def codes_bytes(self) -> int:
        """Bytes that the codes, scales and zero points of all quantised layers take, rounded up by layer."""
        return sum(
            math.ceil(layer.out_features * layer.in_features * layer.scheme.bits_per_weight(layer.in_features) / 8)
            for layer in self.quantised.values()
            if layer.scheme is not None
        )

    def bits_per_weight(self) -> float:
        """Mean stored bits per weight over the quantised layers; 0 when there is none."""
        weights = bits = 0.0
        for layer in self.quantised.values():
            assert layer.scheme is not None
            count = layer.out_features * layer.in_features
            weights += count
            bits += count * layer.scheme.bits_per_weight(layer.in_features)
        return bits / weights if weights else 0.0


def matcher(pattern: str, names: Sequence[str]) -> list[str]:
    """Return the names that `pattern` selects: an exact name, else a glob over whole names, else a regular expression.

    The first reading that selects anything wins. Raise SpecError with the nearest names when none does.
    """
    if pattern in names:
        return [pattern]
    hits = [n for n in names if fnmatch.fnmatchcase(n, pattern)]
    if hits:
        return hits
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise SpecError(f"layer rule {pattern!r} is neither a layer's name nor a valid pattern: {error}") from None
    hits = [n for n in names if expression.search(n)]
    if hits:
        return hits
    near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3)
    raise SpecError(f"layer rule {pattern!r} matches no Linear of this model. Nearest: {', '.join(near) or 'none'}")


def apply_rule(base: Scheme, rule: Rule, pattern: str) -> Scheme | None:
    """Return the scheme that `rule` gives a layer whose scheme is `base`; None means keep the layer."""
    if rule is None or rule == "keep":
        return None
    if isinstance(rule, Scheme):
        return rule
    try:
        if isinstance(rule, str):
            return parse_scheme(rule)
        if not isinstance(rule, Mapping):
            raise SpecError(f'{rule!r} is no preset, no "keep", and no mapping such as {{"bits": 8}}')
        bits = rule.get("bits")
        return None if isinstance(bits, int) and bits >= 16 else base.updated(dict(rule))
    except SpecError as error:
        raise SpecError(f"layer rule {pattern!r}: {error}") from None


def make_plan(
    inside: Sequence[LinearShape],
    outside: Sequence[LinearShape],
    block_lists: Sequence[str],
    scheme: Scheme,
    layer_config: Mapping[str, Rule],
    refuse: Callable[[LinearShape, Scheme], str | None],
    prescribed: Mapping[str, BlockScheme | None] | None = None,
    kept: Mapping[str, str] = MappingProxyType({}),
) -> Plan:
    """Resolve the rules for every Linear.

    inside: Linears in the blocks, quantised unless a rule says otherwise. outside: Linears elsewhere (lm_head), kept
    unless a rule names them. layer_config: pattern -> dict of scheme keys, preset name, Scheme, or "keep"; later rules
    win. refuse: why the output format cannot hold a layer in a scheme, or None. prescribed: schemes that the output
    format itself gives to layers, in place of `scheme`. kept: layers in the blocks that stay as they are unless a rule
    names them, with the reason.
    Raises SpecError for a rule that is wrong or matches nothing, or when nothing is left to quantise.
    """
    shapes = [*inside, *outside]
    inner = {s.name for s in inside}
    chosen: dict[str, tuple[Scheme | None, str]] = {
        s.name: (scheme, "in a block") if s.name in inner else (None, "outside the blocks") for s in shapes
    }
    chosen |= {name: (own, "as the output format mixes its types") for name, own in (prescribed or {}).items()}
    chosen.update({name: (None, reason) for name, reason in kept.items()})
    for pattern, rule in layer_config.items():
        for name in matcher(pattern, list(chosen)):
            chosen[name] = (apply_rule(chosen[name][0] or scheme, rule, pattern), f"layer_config {pattern!r}")
    layers = []
    for shape in shapes:
        layer_scheme, reason = chosen[shape.name]
        refusal = refuse(shape, layer_scheme) if layer_scheme is not None else None
        if refusal is not None:
            layer_scheme, reason = None, refusal
        layers.append(LayerPlan(shape.name, shape.out_features, shape.in_features, layer_scheme, reason))
    counts = Counter(layer.scheme for layer in layers if layer.scheme is not None)
    if not counts:
        raise SpecError("no layer is left to quantise: " + "; ".join(sorted({layer.reason for layer in layers})))
    return Plan(counts.most_common(1)[0][0] if prescribed else scheme, tuple(layers), tuple(block_lists))
