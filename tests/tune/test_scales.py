"""Scales that learn: what is stored moves, the rest stays, and the gradient is that of what is stored."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from auto_round.numerics.kpack import pack_blocks
from auto_round.numerics.kquant import nearest_blocks
from auto_round.qtensor import BlockTensor, QTensor, QuantTensor
from auto_round.spec.blocks import BLOCK_SCHEMES
from auto_round.spec.scheme import Scheme
from auto_round.tune.scales import ScaleState, learned_count

ROWS, INPUTS = 3, 512
INTEGER = [Scheme(2, 64), Scheme(4, 128, False)]


def block_tensor(kind: str) -> BlockTensor:
    weight = torch.randn(ROWS, INPUTS, generator=torch.Generator().manual_seed(1))
    return BlockTensor(nearest_blocks(weight, BLOCK_SCHEMES[kind]), BLOCK_SCHEMES[kind])


def integer_tensor(scheme: Scheme) -> QTensor:
    generator = torch.Generator().manual_seed(2)
    grid = (ROWS, scheme.group_count(INPUTS))
    codes = torch.randint(0, scheme.max_code + 1, (ROWS, INPUTS), generator=generator).to(torch.uint8)
    zeros = None if scheme.sym else torch.randint(0, scheme.max_code + 1, grid, generator=generator).to(torch.uint8)
    return QTensor(codes, torch.rand(grid, generator=generator).add_(0.5).half(), zeros, scheme)


TENSORS = [*map(block_tensor, BLOCK_SCHEMES), *map(integer_tensor, INTEGER)]
NAMES = [tensor.scheme.name for tensor in TENSORS]


def parts_of(tensor: QuantTensor) -> list[Tensor]:
    """W' with all stored scales at 0 but one kind; together they are W'."""
    if isinstance(tensor, QTensor):
        return [tensor.dequantize()]
    fields = tensor.fields()
    kept = [replace(fields, m=None if fields.m is None else torch.zeros_like(fields.m))]
    if fields.m is not None:
        kept.append(replace(fields, d=torch.zeros_like(fields.d)))
    return [BlockTensor(pack_blocks(f, tensor.scheme), tensor.scheme).dequantize() for f in kept]


@pytest.mark.parametrize("tensor", TENSORS, ids=NAMES)
def test_the_first_step_goes_against_the_gradient_of_every_stored_scale(tensor: QuantTensor) -> None:
    grad = torch.randn(ROWS, INPUTS, generator=torch.Generator().manual_seed(3))
    state = ScaleState(tensor)
    state.add(tensor, grad)
    state.step(0.125, 1)
    kinds, rows, groups = state.multipliers.shape
    slopes = torch.stack([(grad * part).view(rows, groups, -1).sum(-1) for part in parts_of(tensor)])
    assert kinds * groups == learned_count(tensor.scheme, INPUTS)
    torch.testing.assert_close(state.multipliers, 1 - 0.125 * slopes.sign())
    torch.testing.assert_close(state.parts()["first"], 0.1 * slopes, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tensor", TENSORS, ids=NAMES)
def test_what_is_stored_is_what_the_passes_saw(tensor: QuantTensor) -> None:
    state = ScaleState(tensor)
    assert torch.equal(state.weight(tensor), tensor.dequantize())
    state.multipliers.copy_(torch.rand(state.multipliers.shape, generator=torch.Generator().manual_seed(4)) + 0.5)
    stored = state.applied(tensor)
    assert torch.equal(stored.dequantize(), state.weight(tensor))
    assert not torch.equal(stored.dequantize(), tensor.dequantize())


@pytest.mark.parametrize("kind", BLOCK_SCHEMES)
def test_codes_and_integer_scales_of_blocks_stay(kind: str) -> None:
    tensor = block_tensor(kind)
    state = ScaleState(tensor)
    state.multipliers.fill_(1.25)
    applied = state.applied(tensor)
    assert isinstance(applied, BlockTensor)
    before, after = tensor.fields(), applied.fields()
    assert torch.equal(before.codes, after.codes)
    for one, other in ((before.scales, after.scales), (before.mins, after.mins)):
        assert one is None or (other is not None and torch.equal(one, other))
    torch.testing.assert_close(after.d, (before.d.float() * 1.25).half())
