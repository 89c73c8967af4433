"""Gradients are those of the dense layer, and no dense weight waits for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.inference.test_backends import layer_of
from tests.inference.test_load import random_qtensor
from torch import Tensor, nn
from torch.nn.functional import linear

from auto_round.inference.backends.int4pack import BACKEND as INT4PACK
from auto_round.inference.select import ranked
from auto_round.qtensor import QTensor
from auto_round.spec.scheme import Scheme

SCHEME, SHAPE = Scheme(4, 64, sym=False), (64, 256)
RUNNABLE = [b for b in ranked() if b.supports(SCHEME, SHAPE, torch.float32, torch.device("cpu")) is None]


def saved_sizes(layer: nn.Module, x: Tensor) -> tuple[Tensor, list[int]]:
    """The layer's output, and the number of elements of each tensor that autograd keeps for it."""
    sizes: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        return layer(x), sizes


@pytest.mark.parametrize("backend", [*RUNNABLE, INT4PACK], ids=lambda b: b.name)
def test_gradients_are_those_of_the_weight_which_is_not_kept(backend: Any) -> None:
    tensor = random_qtensor(*SHAPE, SCHEME, 0, seed=1)
    generator = torch.Generator().manual_seed(2)
    bias = torch.randn(SHAPE[0], generator=generator)
    x = torch.randn(2, 3, SHAPE[1], generator=generator, requires_grad=True)
    slope = torch.randn(2, 3, SHAPE[0], generator=generator)
    layer = layer_of(tensor, backend, bias.clone())
    y, sizes = saved_sizes(layer, x)
    assert all(size < SHAPE[0] * SHAPE[1] for size in sizes)
    assert layer.bias is not None
    ours = torch.autograd.grad(y, (x, layer.bias), slope)
    bias.requires_grad_()
    dense = torch.autograd.grad(linear(x, tensor.dequantize(), bias), (x, bias), slope)
    for a, b in zip(ours, dense, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_gradients_have_the_dtypes_of_what_they_are_of(dtype: torch.dtype) -> None:
    tensor = random_qtensor(*SHAPE, SCHEME, 0, seed=1)
    layer = layer_of(tensor, RUNNABLE[0], torch.randn(SHAPE[0]))
    x = torch.randn(3, SHAPE[1], dtype=dtype, requires_grad=True)
    layer(x).sum().backward()
    assert layer.bias is not None
    assert layer.bias.grad is not None
    assert x.grad is not None
    assert (x.grad.dtype, layer.bias.grad.dtype) == (dtype, torch.float32)
    expected = tensor.dequantize(torch.float64).sum(0).expand(3, -1)
    torch.testing.assert_close(x.grad.double(), expected, atol=1e-2, rtol=1e-2)


def test_a_bias_alone_needs_no_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(random_qtensor(*SHAPE, SCHEME, 0, seed=1), RUNNABLE[0], torch.randn(SHAPE[0]))
    y = layer(torch.randn(3, SHAPE[1]))
    monkeypatch.setattr(QTensor, "dequantize", None)
    y.sum().backward()
    assert layer.bias is not None
    torch.testing.assert_close(layer.bias.grad, torch.full(SHAPE[:1], 3.0))
