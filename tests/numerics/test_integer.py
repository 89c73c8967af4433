"""Fake quantisation and its closed-form gradient, against autograd through straight-through round and clamp."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from auto_round.numerics.integer import (
    SMALLEST_SCALE,
    asym_grid,
    asym_range,
    fake_quantise,
    gradients,
    quantise,
    storable,
    sym_anchor,
)

SHAPE = (6, 3, 16)


def weights(seed: int = 0) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_largest_value_lands_on_the_lowest_code(bits: int) -> None:
    weight = weights()
    scale = sym_anchor(weight, bits)
    zero = torch.full_like(scale, float(2 ** (bits - 1)))
    codes = quantise(weight, None, scale, zero, 2**bits - 1)
    largest = weight.abs().argmax(-1, keepdim=True)
    assert (codes.gather(-1, largest) == 0).all()
    assert torch.equal(scale < 0, weight.gather(-1, largest) > 0)


@pytest.mark.parametrize("bits", [2, 4])
def test_the_asymmetric_grid_spans_the_range(bits: int) -> None:
    weight = weights() + 3  # all positive: zero must be in the range all the same
    low, high = asym_range(weight)
    assert (low <= 0).all()
    scale, zero = asym_grid(low, high, 2**bits - 1)
    error = (fake_quantise(weight, None, scale, zero, 2**bits - 1) - weight).abs()
    assert (error <= 0.51 * scale).all()


def test_stored_scales_keep_their_sign_and_a_floor() -> None:
    scales = storable(torch.tensor([1e-9, -1e-9, 0.0, 1e9, -0.1]))
    assert scales.tolist()[:2] == pytest.approx([SMALLEST_SCALE, -SMALLEST_SCALE], rel=1e-2)
    assert scales[3] == 65504
    assert torch.equal(scales, scales.half().float())


def straight_through(value: Tensor, changed: Tensor) -> Tensor:
    return value + (changed - value).detach()


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("bits", [2, 4])
def test_closed_form_gradients_are_those_of_autograd(bits: int, negative: bool) -> None:
    weight, max_code = weights(), 2**bits - 1
    low, high = asym_range(weight)
    scale = (high - low) * 0.6 / max_code * (-1 if negative else 1)  # 0.6: some values are clamped
    zero = (-low / scale).abs().round().clamp(0, max_code)
    offset = 0.3 * weights(1)
    grad = weights(2)
    leaves = [t.clone().requires_grad_() for t in (offset, scale, zero)]
    ratio = weight / scale + leaves[0]
    level = straight_through(ratio, ratio.round()) + leaves[2]
    codes = level.clamp(0, max_code)
    offset_grad, zero_grad = torch.autograd.grad((scale * (codes - leaves[2]) * grad).sum(), (leaves[0], leaves[2]))
    (scale_grad,) = torch.autograd.grad((leaves[1] * (codes.detach() - zero) * grad).sum(), leaves[1])
    found = gradients(weight, offset, scale, zero, max_code, grad)
    assert torch.allclose(found[0] * scale.abs(), offset_grad, atol=1e-6)
    assert torch.allclose(found[1], scale_grad, atol=1e-4)
    assert torch.allclose(found[2], zero_grad, atol=1e-5)
    assert (offset_grad == 0).any()
