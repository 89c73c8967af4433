from __future__ import annotations

import pytest

from auto_round.errors import SpecError
from auto_round.spec.presets import RECIPES, SCHEMES, recipe
from auto_round.spec.recipe import Recipe
from auto_round.spec.scheme import Scheme


@pytest.mark.parametrize(
    ("text", "scheme"),
    [
        ("W4A16", Scheme(4, 128)),
        ("w2a16g64", Scheme(2, 64)),
        ("W8A16_G32", Scheme(8, 32)),
        ("W3A16G-1", Scheme(3, -1)),
        ("W4A16G32_asym", Scheme(4, 32, sym=False)),
    ],
)
def test_presets_are_parsed(text: str, scheme: Scheme) -> None:
    assert Scheme.parse(text) == scheme


def test_every_preset_parses_to_itself() -> None:
    assert {name: Scheme.parse(name) for name in SCHEMES} == dict(SCHEMES)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"bits": 5}, "bits=5"),
        ({"bits": True}, "bits=True"),
        ({"group_size": 0}, "group_size=0"),
        ({"group_size": -2}, "group_size=-2"),
        ({"group_size": 1.5}, "whole number"),
        ({"sym": "yes"}, "sym"),
    ],
)
def test_bad_schemes_name_the_value(values: dict[str, object], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        Scheme(**values)  # type: ignore[arg-type]


def test_unknown_scheme_says_how_to_write_it() -> None:
    with pytest.raises(SpecError, match="write it like W4A16"):
        Scheme.parse("4bit")


def test_groups_of_rows_that_no_group_divides() -> None:
    assert Scheme(4, 128).group_count(576) == 5
    assert Scheme(4, 128).group_width(96) == 96
    assert Scheme(4, -1).group_count(576) == 1


def test_bits_per_weight_counts_scales_and_zero_points() -> None:
    assert Scheme(4, 128).bits_per_weight(1024) == pytest.approx(4 + 20 / 128)


@pytest.mark.parametrize(
    "values", [{"iters": -1}, {"nsamples": 0}, {"lr": 0.0}, {"minmax_lr": 2.0}, {"start": "random"}, {"heldout": 0.9}]
)
def test_bad_recipes_name_the_field(values: dict[str, object]) -> None:
    with pytest.raises(SpecError, match=next(iter(values))):
        Recipe(**values)  # type: ignore[arg-type]


def test_a_finishing_step_moves_the_largest_code_as_far_at_every_width() -> None:
    assert {2**bits * Recipe().scale_lr(bits) for bits in (2, 3, 4, 8)} == {2**-6}
    assert Recipe(finish_lr=1e-3).scale_lr(2) == 1e-3


def test_recipes_are_those_users_know() -> None:
    assert (RECIPES["best"].nsamples, RECIPES["best"].iters, RECIPES["best"].finish_iters) == (512, 400, 128)
    assert (RECIPES["default"].nsamples, RECIPES["default"].iters) == (128, 200)
    assert (RECIPES["light"].nsamples, RECIPES["light"].iters) == (128, 50)
    assert RECIPES["rtn"].iters == 0
    with pytest.raises(SpecError, match="light"):
        recipe("ligth")


def test_ranges_move_in_smaller_steps_than_v_and_in_larger_ones_at_two_bits() -> None:
    recipe = Recipe(iters=100)
    assert [recipe.range_lr(bits) for bits in (2, 3, 4, 8)] == pytest.approx([5e-3, 1e-3, 1e-3, 1e-3])
    assert Recipe(minmax_lr=0.3).range_lr(2) == 0.3
    assert Recipe(enable_minmax_tuning=False).range_lr(4) == 0


def test_lr_follows_from_iters_and_bits_but_for_few_steps() -> None:
    assert [Recipe(iters=100).v_lr(bits) for bits in (2, 3, 4, 8)] == pytest.approx([2e-2, 1e-2, 1e-2, 1e-2])
    assert Recipe(iters=4).v_lr(4) == Recipe(iters=25).v_lr(4) == pytest.approx(1 / 25)
    assert Recipe(iters=4).v_lr(2) == Recipe(iters=50).v_lr(2) == pytest.approx(1 / 25)
    assert Recipe(lr=0.1, iters=4).v_lr(2) == 0.1
    assert Recipe(lr=0.1).updated(lr=None, iters=7).lr == 0.1
