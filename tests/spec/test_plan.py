from __future__ import annotations

import pytest

from auto_round.errors import SpecError
from auto_round.spec.plan import LinearShape, Plan, Rule, make_plan
from auto_round.spec.scheme import Scheme

INSIDE = [LinearShape(f"model.layers.{i}.{name}", 64, 32) for i in range(12) for name in ("q_proj", "down_proj")]
HEAD = [LinearShape("lm_head", 100, 32)]


def plan(rules: dict[str, Rule]) -> Plan:
    return make_plan(INSIDE, HEAD, ["model.layers"], Scheme(4, 128), rules, lambda shape, scheme: None)


def test_blocks_are_quantised_and_the_head_is_kept() -> None:
    result = plan({})
    assert set(result.quantised) == {shape.name for shape in INSIDE}
    assert result.kept["lm_head"].reason == "outside the blocks"


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("model.layers.1.q_proj", 1),  # the name itself, not layers 10 and 11 as well
        ("*.q_proj", 12),
        (r"layers\.(0|1)\.", 4),
        ("layers.1*", 6),  # no glob over whole names: read as a regular expression, "layers.1" and more
    ],
)
def test_a_pattern_is_a_name_or_a_glob_or_a_regular_expression(pattern: str, count: int) -> None:
    changed = [layer for layer in plan({pattern: {"bits": 2}}).layers if layer.scheme == Scheme(2, 128)]
    assert len(changed) == (24 if pattern == "layers.1*" else count)


def test_later_rules_win_and_build_on_earlier_ones() -> None:
    result = plan({"*": {"group_size": 32}, "*.q_proj": {"bits": 8}, "model.layers.3.*": "keep", "lm_head": "W8A16G32"})
    assert result.quantised["model.layers.0.q_proj"].scheme == Scheme(8, 32)
    assert result.quantised["model.layers.0.down_proj"].scheme == Scheme(4, 32)
    assert "model.layers.3.q_proj" in result.kept
    assert result.quantised["lm_head"].scheme == Scheme(8, 32)


def test_sixteen_bits_mean_keep() -> None:
    assert "model.layers.2.q_proj" in plan({"model.layers.2.q_proj": {"bits": 16}}).kept


def test_a_rule_that_matches_nothing_names_the_nearest() -> None:
    with pytest.raises(SpecError, match=r"matches no Linear.*model\.layers\.1\.q_proj"):
        plan({"model.layers.1.q_porj": {"bits": 2}})


def test_an_unknown_key_names_the_rule() -> None:
    with pytest.raises(SpecError, match=r"'\*': unknown key 'bit'"):
        plan({"*": {"bit": 2}})


def test_a_refused_layer_is_kept_with_the_reason() -> None:
    result = make_plan(
        INSIDE, [], ["model.layers"], Scheme(), {}, lambda shape, scheme: "odd" if "q_proj" in shape.name else None
    )
    assert {layer.reason for layer in result.kept.values()} == {"odd"}
    with pytest.raises(SpecError, match="no layer is left to quantise: too odd"):
        make_plan(INSIDE, [], ["model.layers"], Scheme(), {}, lambda shape, scheme: "too odd")


@pytest.mark.parametrize("rule", [8, ["W8A16"], {"bits": None}, {"bits": "eight"}, {"bits": 4.0}, "W5A16", True])
def test_a_rule_that_is_none_is_refused_by_its_pattern(rule: object) -> None:
    with pytest.raises(SpecError, match=r"layer rule '\*\.down_proj'"):
        plan({"*.down_proj": rule})  # type: ignore[dict-item]
