"""Sets of layers that runtimes merge, found in a plan whose schemes differ inside one."""

from __future__ import annotations

from auto_round.spec.fusions import broken_fusions
from auto_round.spec.plan import LinearShape, make_plan
from auto_round.spec.scheme import Scheme

NAMES = [
    *(f"model.layers.0.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
    *(f"model.layers.0.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
    *(f"model.layers.1.mlp.experts.{e}.{name}" for e in range(3) for name in ("gate_proj", "up_proj", "down_proj")),
]


def broken(**rules: object) -> list[str]:
    shapes = [LinearShape(name, 64, 64) for name in NAMES]
    config = {name.replace("__", "."): rule for name, rule in rules.items()}
    return broken_fusions(make_plan(shapes, [], ["model.layers"], Scheme(4, 32), config, lambda *_: None))  # type: ignore[arg-type]


def test_one_scheme_for_all_breaks_nothing() -> None:
    assert broken() == []


def test_layers_that_are_not_merged_may_differ() -> None:
    assert broken(o_proj={"bits": 8}, mlp__down_proj={"bits": 2}) == []


def test_a_part_of_a_merged_layer_is_named() -> None:
    (sentence,) = broken(k_proj={"bits": 8})
    assert sentence.startswith("model.layers.0.self_attn: q_proj, v_proj W4A16G32; k_proj W8A16G32")
    (sentence,) = broken(**{"layers.0.mlp.up_proj": "keep"})
    assert sentence.startswith("model.layers.0.mlp: gate_proj W4A16G32; up_proj kept")


def test_the_experts_of_a_layer_are_one() -> None:
    (sentence,) = broken(**{"experts.1.down_proj": {"bits": 2}})
    assert sentence.startswith("model.layers.1.mlp.experts: 0.gate_proj, 0.up_proj, 0.down_proj, ... W4A16G32")
    assert "1.down_proj W2A16G32" in sentence
