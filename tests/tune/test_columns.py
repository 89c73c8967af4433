"""The compiled loops over columns against their plain twins in torch, which may join a product and a sum in one
rounding: what comes out is the same but for the last bits, and for codes where such a bit decides."""

from __future__ import annotations

import shutil

import pytest
import torch
from tests.conftest import each_path
from torch import Tensor

from auto_round.numerics import compensate
from auto_round.numerics.compensate import COLUMNS, Run, compensated_codes, compensation, descended
from auto_round.tune.columns import compiled_loops, descend_run, round_run

found = compiled_loops()
path_of_this_cpu = each_path(found)
each_shape = pytest.mark.parametrize(("columns", "outputs"), [(1, 1), (5, 64), (COLUMNS, 130), (100, 63), (17, 1000)])


def problem(columns: int, outputs: int) -> tuple[Tensor, Tensor, Run]:
    """Two (columns, outputs) tensors, weights and codes, and a run of them with scales of both signs."""
    draw = torch.Generator().manual_seed(columns * outputs)
    scale = torch.randn(3, outputs, generator=draw) * 0.3
    zero = torch.randint(0, 8, (3, outputs), generator=draw).float()
    lower = torch.randn(columns, columns, generator=draw).t() * 0.1  # as a factor lies, its columns contiguous
    group = torch.randint(0, 3, (columns,), generator=draw)
    values = torch.randn(columns, outputs, generator=draw)
    codes = torch.randint(0, 8, (columns, outputs), generator=draw).float()
    return values, codes, Run(lower, 0.5 + torch.rand(columns, generator=draw), group, scale, zero, 7)


@path_of_this_cpu
@each_shape
def test_rounding_is_that_of_torch(path: int, columns: int, outputs: int) -> None:
    values, _, run = problem(columns, outputs)
    wanted = values.clone()
    errors = compensate.round_run(wanted, run)
    found = round_run(values, run, path)
    assert torch.equal(values, wanted)
    torch.testing.assert_close(found, errors, rtol=1e-4, atol=1e-5)


@path_of_this_cpu
@each_shape
def test_descent_is_that_of_torch(path: int, columns: int, outputs: int) -> None:
    pull, codes, run = problem(columns, outputs)
    wanted = codes.clone()
    moves = compensate.descend_run(pull.clone(), wanted, run)
    found = descend_run(pull, codes, run, path)
    assert torch.equal(codes, wanted)
    torch.testing.assert_close(found, moves)


@path_of_this_cpu
def test_every_path_gives_the_same_bits(path: int) -> None:
    values, codes, run = problem(COLUMNS, 130)
    rounded, descent = (values.clone(), values.clone()), (codes.clone(), codes.clone())
    assert torch.equal(round_run(rounded[0], run, 0), round_run(rounded[1], run, path))
    assert torch.equal(descend_run(values, descent[0], run, 0), descend_run(values, descent[1], run, path))
    assert torch.equal(*rounded)
    assert torch.equal(*descent)


def test_a_whole_layer_comes_as_near() -> None:
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(2000, 300, generator=draw) @ torch.randn(300, 300, generator=draw)
    weight, moment = torch.randn(70, 300, generator=draw), inputs.T @ inputs
    known = compensation(moment, 0.01)
    grid = (torch.full((70, 5), 0.3), torch.full((70, 5), 8.0), 64, 15, known)
    plain = descended(weight, compensated_codes(weight, *grid), *grid)
    compiled = descended(weight, compensated_codes(weight, *grid, round_run), *grid, descend_run)
    errors = [float(((weight - 0.3 * (codes - 8)) @ moment).square().mean()) for codes in (plain, compiled)]
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)
    assert (plain == compiled).float().mean() > 0.99


def test_where_nothing_was_compiled_torch_does_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    values, codes, run = problem(20, 70)
    first = round_run(values.clone(), run), descend_run(values.clone(), codes.clone(), run)
    monkeypatch.setattr("auto_round.tune.columns.compiled_loops", lambda: None)
    second = round_run(values.clone(), run), descend_run(values.clone(), codes.clone(), run)
    for compiled, plain in zip(first, second, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-5)


def test_it_was_compiled_where_there_is_a_compiler() -> None:
    assert compiled_loops() is not None or not any(map(shutil.which, ("cc", "gcc", "clang")))
