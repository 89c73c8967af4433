"""The compiled passes against their plain twins in torch."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from tests.conftest import each_path
from torch import Tensor

from auto_round.numerics.groups import from_groups, to_groups
from auto_round.numerics.integer import fake_quantise, gradients, storable
from auto_round.tune.passes import BETAS, Grids, Motion, build_weight, compiled_passes, step_offsets

SHAPES = [(3, 64, 16), (5, 100, 32), (2, 4096, 4096), (130, 576, 128), (1, 7, 8), (4, 90, 20)]
found = compiled_passes()
path_of_this_cpu = each_path(found)


def each_problem(test: Any) -> Any:
    """A test of every path with every dtype and shape."""
    shapes = pytest.mark.parametrize(("rows", "inputs", "width"), SHAPES)
    return path_of_this_cpu(pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])(shapes(test)))


def problem(rows: int, inputs: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Grids, Tensor]:
    """Weight, offset, grids with scales of both signs and a low, and a gradient; some values beyond the grid."""
    draw = torch.Generator().manual_seed(rows * inputs)
    weight = to_groups(torch.randn(rows, inputs, generator=draw), width)
    offset = torch.rand(weight.shape, generator=draw) - 0.5
    groups = (*weight.shape[:2], 1)
    scale = storable(torch.randn(groups, generator=draw) * 0.3)
    zero = torch.randint(0, 8, groups, generator=draw).float()
    grad = torch.randn(rows, inputs, generator=draw).to(dtype)
    grad[0, ::3] = 0
    return weight, offset, Grids(scale, zero, 7, torch.rand(groups, generator=draw)), grad


@each_problem
def test_built_weight_is_that_of_torch(path: int, dtype: torch.dtype, rows: int, inputs: int, width: int) -> None:
    weight, offset, grids, _ = problem(rows, inputs, width, dtype)
    assert grids.low is not None
    fake = fake_quantise(weight + grids.low, offset, grids.scale, grids.zero, 7) - grids.low
    wide = torch.full((rows, inputs + 3), 5.0, dtype=dtype)
    build_weight(weight, offset, grids, wide[:, :inputs], path)
    assert torch.equal(wide[:, :inputs], from_groups(fake, inputs).to(dtype))
    assert torch.equal(wide[:, inputs:], torch.full((rows, 3), 5.0, dtype=dtype))  # nothing beyond a row is touched


def moved(offset: Tensor) -> Motion:
    """The motion of an offset that has been moved before."""
    draw = torch.Generator().manual_seed(5)
    motion = Motion.of(offset)
    motion.first.copy_(torch.randn(offset.shape, generator=draw) * 0.3)
    motion.second.copy_(torch.rand(offset.shape, generator=draw))
    motion.steps = 3
    return motion


@each_problem
def test_step_is_that_of_torch(path: int, dtype: torch.dtype, rows: int, inputs: int, width: int) -> None:
    weight, offset, grids, grad = problem(rows, inputs, width, dtype)
    assert grids.low is not None
    met = weight + grids.low
    slope, scale_grad, zero_grad = gradients(met, offset, grids.scale, grids.zero, 7, to_groups(grad.float(), width))
    motion = moved(offset)
    first = motion.first.float() * BETAS[0] + slope * (1 - BETAS[0])
    second = motion.second.float() * BETAS[1] + slope.square() * (1 - BETAS[1])
    correction = (1 - BETAS[1] ** 4) ** 0.5 / (1 - BETAS[0] ** 4)
    wanted = offset - 0.01 * (first / (second.double().sqrt().float() + 1e-30) * correction).clamp(-1, 1)
    found_scale, found_zero = step_offsets(weight, offset, motion, grids, grad, 0.01, path)
    assert torch.equal(from_groups(offset, inputs), from_groups(wanted, inputs))
    assert torch.equal(from_groups(motion.first, inputs), from_groups(first.bfloat16(), inputs))
    assert torch.equal(from_groups(motion.second, inputs), from_groups(second.bfloat16(), inputs))
    torch.testing.assert_close(found_scale, scale_grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found_zero, zero_grad, rtol=1e-4, atol=1e-3)


def test_first_step_is_by_the_sign() -> None:
    weight, offset, grids, grad = problem(130, 576, 128, torch.float32)
    assert grids.low is not None
    slope, *_ = gradients(weight + grids.low, offset, grids.scale, grids.zero, 7, to_groups(grad, 128))
    before = offset.clone()
    step_offsets(weight, offset, Motion.of(offset), grids, grad, 0.01)
    torch.testing.assert_close(from_groups(before - offset, 576), from_groups(0.01 * slope.sign(), 576))


def test_gradients_that_take_turns_move_less_than_those_that_agree() -> None:
    weight, offset, grids, grad = problem(8, 64, 32, torch.float32)
    travelled = []
    for turns in (1, -1):
        place, motion = offset.clone(), Motion.of(offset)
        for k in range(4):
            before = place.clone()
            step_offsets(weight, place, motion, grids, grad * turns**k, 1e-4)
            assert float((place - before).abs().max()) <= 1.01e-4  # never by more than lr
        travelled.append(float((place - before).abs().sum()))
    assert travelled[1] < 0.7 * travelled[0]


@path_of_this_cpu
def test_sums_depend_on_neither_path_nor_threads(path: int) -> None:
    weight, offset, grids, grad = problem(130, 576, 128, torch.float32)
    threads = torch.get_num_threads()
    expected = step_offsets(weight, offset.clone(), Motion.of(offset), grids, grad, 0.01, 0)
    torch.set_num_threads(1)
    try:
        got = step_offsets(weight, offset.clone(), Motion.of(offset), grids, grad, 0.01, path)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(expected[0], got[0])
    assert torch.equal(expected[1], got[1])


def test_where_nothing_was_compiled_torch_does_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, offset, grids, grad = problem(130, 576, 128, torch.bfloat16)
    results = []
    for _ in range(2):
        place, built = offset.clone(), torch.empty(130, 576)
        motion = Motion.of(offset)
        for turn in (1, -0.5):
            slopes = step_offsets(weight, place, motion, grids, turn * grad, 0.01)
        build_weight(weight, place, grids, built)
        results.append((place, built, motion.first, motion.second, *slopes))
        monkeypatch.setattr("auto_round.tune.passes.compiled_passes", lambda: None)
        monkeypatch.setattr("auto_round.tune.passes.ROW_CHUNK", 10_000)
    for compiled, plain in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-3)
    for part in range(4):
        assert torch.equal(results[0][part], results[1][part])


def test_they_are_built_where_there_is_a_compiler() -> None:
    assert compiled_passes() is not None or not any(map(shutil.which, ("cc", "gcc", "clang")))


def test_a_dtype_the_compiled_passes_lack_goes_through_torch() -> None:
    weight, offset, grids, _ = problem(4, 90, 20, torch.float32)
    half, whole = torch.empty(4, 90, dtype=torch.float16), torch.empty(4, 90)
    build_weight(weight, offset, grids, half)
    build_weight(weight, offset, grids, whole)
    assert torch.equal(half, whole.half())
