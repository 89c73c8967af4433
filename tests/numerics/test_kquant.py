"""The search of block grids: what it stores is what the file holds, and its error beats plain rounding's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from auto_round.numerics.kquant import Grid, block_error, half, plain_grid, search_grid
from auto_round.spec.blocks import BLOCK_SCHEMES, BlockScheme

TYPES = list(BLOCK_SCHEMES.values())
GAIN = {2: 1.4, 3: 1.2, 4: 1.1, 5: 1.03, 6: 1.0, 8: 1.0}  # least factor between the errors of plain and searched grids


def grouped(scheme: BlockScheme, rows: int = 16, blocks: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    spread = 0.02 * torch.rand(rows, blocks, scheme.subs, 1, generator=generator) + 0.005
    return spread * torch.randn(rows, blocks, scheme.subs, scheme.width, generator=generator)


def importance(scheme: BlockScheme, blocks: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(blocks, scheme.subs, scheme.width, generator=generator).square() + 0.01


def integers(values: Tensor, least: int, most: int) -> bool:
    return bool((values == values.round()).all() and (values >= least).all() and (values <= most).all())


@pytest.mark.parametrize("search", [False, True], ids=["plain", "search"])
@pytest.mark.parametrize("scheme", TYPES, ids=lambda s: s.name)
def test_grids_are_what_a_file_can_hold(scheme: BlockScheme, search: bool) -> None:
    weight = grouped(scheme)
    grid = search_grid(weight, importance(scheme), scheme) if search else plain_grid(weight, scheme)
    assert torch.equal(grid.d, grid.d.half().float())
    assert grid.d.shape == (16, 2, 1, 1)
    assert integers(grid.scales, *scheme.scales)
    assert (grid.step() != 0).all()
    assert (grid.m is not None) == (not scheme.sym)
    if grid.m is not None:
        assert torch.equal(grid.m, grid.m.half().float())
        assert integers(grid.mins, 0, scheme.scales[1])


@pytest.mark.parametrize("scheme", TYPES, ids=lambda s: s.name)
def test_search_lowers_the_weighted_error(scheme: BlockScheme) -> None:
    weight, weights = grouped(scheme), importance(scheme)
    plain = block_error(weight, weights, plain_grid(weight, scheme), scheme).sum()
    searched = block_error(weight, weights, search_grid(weight, weights, scheme), scheme).sum()
    assert plain > GAIN[scheme.bits] * searched


def test_no_other_integers_are_better_than_those_of_a_small_block_by_much() -> None:
    """All 15 x 16 pairs of scale and min of one sub-block, the rest as found: the search is near the best of them."""
    scheme = BLOCK_SCHEMES["q2_k"]
    weight, weights = grouped(scheme), importance(scheme)
    grid = search_grid(weight, weights, scheme)
    found = block_error(weight, weights, grid, scheme)
    best = found.clone()
    for scale in range(1, 16):
        for low in range(16):
            other = Grid(grid.d, grid.m, torch.full_like(grid.scales, scale), torch.full_like(grid.mins, low))
            best = torch.minimum(best, block_error(weight, weights, other, scheme))
    assert found.sum() < 1.1 * best.sum()  # 1.07 as measured; neighbours alone are tried


@pytest.mark.parametrize("scheme", TYPES, ids=lambda s: s.name)
def test_zeros_stay_zero_and_constants_are_held(scheme: BlockScheme) -> None:
    weight = torch.zeros(3, 1, scheme.subs, scheme.width)
    weight[1], weight[2] = -0.25, 0.25
    errors = block_error(
        weight, torch.ones_like(weight[0]), search_grid(weight, torch.ones_like(weight[0]), scheme), scheme
    )
    assert errors[0].sum() == 0
    assert errors[1:].sum() < 1e-4 * weight.square().sum()


def test_halves_keep_sign_and_never_vanish() -> None:
    values = half(torch.tensor([0.0, 1e-12, -1e-12, 1.0001, 1e6]))
    assert values.tolist() == [2**-24, 2**-24, -(2**-24), 1.0, 65504.0]
