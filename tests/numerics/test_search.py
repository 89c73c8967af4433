"""Range search lowers the weighted error; compensation lowers the output error further."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from auto_round.errors import AutoRoundError
from auto_round.numerics import compensate
from auto_round.numerics.compensate import compensated_codes, compensation, descended, offsets_for
from auto_round.numerics.groups import expand_groups, from_groups, to_groups
from auto_round.numerics.integer import asym_grid, asym_range, fake_quantise, quantise, storable, sym_anchor
from auto_round.numerics.search import search_asym, search_sym

OUT, IN, WIDTH = 48, 96, 32


@pytest.fixture(scope="module")
def layer() -> tuple[Tensor, Tensor]:
    """A weight (48, 96) and the second moment of correlated inputs."""
    g = torch.Generator().manual_seed(0)
    inputs = torch.randn(512, IN, generator=g) @ torch.randn(IN, IN, generator=g)
    return torch.randn(OUT, IN, generator=g), inputs.t() @ inputs / 512


def weighted(weight: Tensor, fake: Tensor, moment: Tensor) -> Tensor:
    """Error per (row, group), channels taken as independent."""
    return to_groups((weight - fake).square() * moment.diagonal(), WIDTH).sum(-1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_searched_symmetric_grid_is_never_much_worse_and_better_overall(
    layer: tuple[Tensor, Tensor], bits: int
) -> None:
    weight, moment = layer
    grouped, importance = to_groups(weight, WIDTH), to_groups(moment.diagonal()[None], WIDTH)[0]
    zero, max_code = torch.tensor([[[float(2 ** (bits - 1))]]]), 2**bits - 1
    plain, found = storable(sym_anchor(grouped, bits)), search_sym(grouped, importance, bits)
    errors = [
        weighted(weight, from_groups(fake_quantise(grouped, None, scale, zero, max_code), IN), moment)
        for scale in (plain, found)
    ]
    assert torch.equal(found, found.half().float())
    assert errors[1].sum() < (0.97 if bits < 8 else 1.0) * errors[0].sum()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_searched_asymmetric_grid_is_better_overall(layer: tuple[Tensor, Tensor], bits: int) -> None:
    weight, moment = layer
    grouped, importance = to_groups(weight, WIDTH), to_groups(moment.diagonal()[None], WIDTH)[0]
    max_code = 2**bits - 1
    plain, found = asym_grid(*asym_range(grouped), max_code), search_asym(grouped, importance, bits)
    errors = [
        weighted(weight, from_groups(fake_quantise(grouped, None, scale, zero, max_code), IN), moment).sum()
        for scale, zero in (plain, found)
    ]
    assert torch.equal(found[1], found[1].round())
    assert found[1].min() >= 0
    assert found[1].max() <= max_code
    assert errors[1] < errors[0]


def damped(moment: Tensor, shrinkage: float) -> Tensor:
    diagonal = moment.double().diagonal()
    return moment.double() + torch.diag(shrinkage * diagonal + 1e-3 * diagonal.mean())


def plain_gptq(weight: Tensor, scale: Tensor, zero: Tensor, max_code: int, moment: Tensor) -> Tensor:
    """The textbook loop (OBQ updates with an explicit inverse), column by column in order of importance."""
    order = torch.argsort(moment.diagonal(), descending=True, stable=True).tolist()
    rest, codes, left = weight.double().clone(), torch.empty_like(weight), list(order)
    for column in order:
        inverse = torch.linalg.inv(moment[left][:, left])
        code = ((rest[:, column] / scale[:, column]).round() + zero[:, column]).clamp(0, max_code)
        codes[:, column] = code
        error = rest[:, column] - scale[:, column] * (code - zero[:, column])
        rest[:, left] -= error[:, None] * inverse[0][None] / inverse[0, 0]
        left.remove(column)
    return codes


def test_blocked_compensation_is_the_textbook_loop(layer: tuple[Tensor, Tensor]) -> None:
    weight, moment = layer
    scale = expand_groups(search_sym(to_groups(weight, WIDTH), torch.ones(3, WIDTH), 4)[..., 0], WIDTH, IN)
    zero = torch.full_like(scale, 8.0)
    codes = compensated_codes(weight, scale, zero, 1, 15, compensation(moment, 0.1))
    reference = plain_gptq(weight, scale, zero, 15, damped(moment, 0.1))
    assert (codes == reference).float().mean() > 0.999  # float32 against float64 may flip a tie


def test_compensation_lowers_the_output_error(layer: tuple[Tensor, Tensor]) -> None:
    weight, moment = layer
    scale = expand_groups(search_sym(to_groups(weight, WIDTH), torch.ones(3, WIDTH), 3)[..., 0], WIDTH, IN)
    zero = torch.full_like(scale, 4.0)

    def output_error(codes: Tensor) -> Tensor:
        difference = weight - scale * (codes - zero)
        return ((difference @ moment) * difference).sum()

    nearest = quantise(weight, None, scale, zero, 7)
    codes = compensated_codes(weight, scale, zero, 1, 7, compensation(moment, 0.01))
    assert output_error(codes) < 0.7 * output_error(nearest)


def plain_descent(
    weight: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, max_code: int, moment: Tensor, order: Tensor
) -> Tensor:
    """One pass of coordinate descent in float64, the error's whole gradient computed anew for every column."""
    codes = codes.double()
    for column in order.tolist():
        rounded = scale.double() * (codes - zero)
        pull = ((weight - rounded) @ moment)[:, column]
        ideal = rounded[:, column] + pull / moment[column, column]
        codes[:, column] = ((ideal / scale[:, column]).round() + zero[:, column]).clamp(0, max_code)
    return codes.float()


def test_blocked_descent_is_the_textbook_loop(layer: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    weight, moment = layer
    known = compensation(moment, 0.01)
    scale, zero = torch.full((OUT, IN), -0.8), torch.full((OUT, IN), 2.0)
    begin = quantise(weight, None, scale, zero, 3)
    expected = begin
    for _ in range(compensate.SWEEPS):
        expected = plain_descent(weight, expected, scale, zero, 3, damped(moment, 0.01), known.order)
    for columns, rows in ((128, 1024), (32, 40)):
        monkeypatch.setattr(compensate, "COLUMNS", columns)
        monkeypatch.setattr(compensate, "ROWS", rows)
        found = descended(weight, begin.clone(), scale, zero, 1, 3, compensation(moment, 0.01))
        assert (found == expected).float().mean() > 0.999


@pytest.mark.parametrize("bits", [2, 4])
def test_descent_lowers_the_error_that_compensation_leaves(layer: tuple[Tensor, Tensor], bits: int) -> None:
    weight, moment = layer
    max_code, known = 2**bits - 1, compensation(moment, 0.01)
    scale = search_sym(to_groups(weight, WIDTH), torch.ones(3, WIDTH), bits)[..., 0]
    zero = torch.full_like(scale, 2.0 ** (bits - 1))

    def output_error(codes: Tensor) -> float:
        rounded = expand_groups(scale, WIDTH, IN) * (codes - 2 ** (bits - 1))
        return float((((weight - rounded) @ moment) * (weight - rounded)).sum())

    codes = compensated_codes(weight, scale, zero, WIDTH, max_code, known)
    before = output_error(codes)
    assert output_error(descended(weight, codes, scale, zero, WIDTH, max_code, known)) < 0.97 * before


def test_offsets_reproduce_the_codes(layer: tuple[Tensor, Tensor]) -> None:
    weight, moment = layer
    scale = torch.full_like(weight, -0.4)
    zero = torch.full_like(weight, 4.0)
    codes = compensated_codes(weight, scale, zero, 1, 7, compensation(moment, 0.01))
    offset = offsets_for(weight, codes, scale, zero)
    assert torch.equal(quantise(weight, offset, scale, zero, 7), codes)
    assert (offset == 0).float().mean() > 0.3


def test_dead_channels_and_few_tokens_are_survived() -> None:
    moment = torch.zeros(8, 8)
    moment[0, 0] = 1.0
    assert torch.isfinite(compensation(moment, 0.01).factor).all()
    with pytest.raises(AutoRoundError, match="not finite"):
        compensation(torch.full((8, 8), float("nan")), 0.01)
