"""The compiled passes against their plain twins in torch."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

from auto_round.numerics.groups import from_groups, to_groups
from auto_round.numerics.integer import fake_quantise, gradients, storable
from auto_round.tune.passes import PATHS, Grids, build_weight, compiled_passes, step_offsets

SHAPES = [(3, 64, 16), (5, 100, 32), (2, 4096, 4096), (130, 576, 128), (1, 7, 8), (4, 90, 20)]
found = compiled_passes()
path_of_this_cpu = pytest.mark.parametrize("path", range(found.paths if found else 0), ids=lambda path: PATHS[path])


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


@each_problem
def test_step_is_that_of_torch(path: int, dtype: torch.dtype, rows: int, inputs: int, width: int) -> None:
    weight, offset, grids, grad = problem(rows, inputs, width, dtype)
    assert grids.low is not None
    met = weight + grids.low
    slope, scale_grad, zero_grad = gradients(met, offset, grids.scale, grids.zero, 7, to_groups(grad.float(), width))
    wanted = from_groups(offset - 0.01 * slope.sign(), inputs)
    found_scale, found_zero = step_offsets(weight, offset, grids, grad, 0.01, path)
    assert torch.equal(from_groups(offset, inputs), wanted)
    torch.testing.assert_close(found_scale, scale_grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found_zero, zero_grad, rtol=1e-4, atol=1e-3)


@path_of_this_cpu
def test_sums_depend_on_neither_path_nor_threads(path: int) -> None:
    weight, offset, grids, grad = problem(130, 576, 128, torch.float32)
    threads = torch.get_num_threads()
    expected = step_offsets(weight, offset.clone(), grids, grad, 0.01, 0)
    torch.set_num_threads(1)
    try:
        got = step_offsets(weight, offset.clone(), grids, grad, 0.01, path)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(expected[0], got[0])
    assert torch.equal(expected[1], got[1])


def test_where_nothing_was_compiled_torch_does_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, offset, grids, grad = problem(130, 576, 128, torch.bfloat16)
    results = []
    for _ in range(2):
        moved, built = offset.clone(), torch.empty(130, 576)
        slopes = step_offsets(weight, moved, grids, grad, 0.01)
        build_weight(weight, moved, grids, built)
        results.append((moved, built, *slopes))
        monkeypatch.setattr("auto_round.tune.passes.compiled_passes", lambda: None)
        monkeypatch.setattr("auto_round.tune.passes.ROW_CHUNK", 10_000)
    for compiled, plain in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-3)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_they_are_built_where_there_is_a_compiler() -> None:
    assert compiled_passes() is not None or not any(map(shutil.which, ("cc", "gcc", "clang")))


def test_a_dtype_the_compiled_passes_lack_goes_through_torch() -> None:
    weight, offset, grids, _ = problem(4, 90, 20, torch.float32)
    half, whole = torch.empty(4, 90, dtype=torch.float16), torch.empty(4, 90)
    build_weight(weight, offset, grids, half)
    build_weight(weight, offset, grids, whole)
    assert torch.equal(half, whole.half())
