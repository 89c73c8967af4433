"""The product of a quantised layer with its gradients to inputs and bias, the same for every backend.

Between forward and backward only the packed weight is held, which the layer has anyway: the dense one, which autograd
would keep for every layer of the model, is made where a gradient passes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from auto_round.inference.base import Backend, Prepared, tracing


def differentiable_linear(x: Tensor, backend: Backend[Any], prepared: Prepared, bias: Tensor | None) -> Tensor:
    """``backend.linear(x, prepared, bias)``; where a gradient is wanted, one that flows to x and bias.

    jit.trace gets the operators themselves, as it cannot save a function with a gradient of its own.
    """
    asked = x.requires_grad or (bias is not None and bias.requires_grad)
    if asked and torch.is_grad_enabled() and not tracing():
        y: Tensor = _Product.apply(x, bias, backend, prepared)  # type: ignore[no-untyped-call]
        return y
    return backend.linear(x, prepared, bias)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, bias: Tensor | None, backend: Backend[Any], prepared: Prepared) -> Tensor:
        return backend.linear(x, prepared, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, bias, _, ctx.prepared = inputs
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """grad (..., out) -> gradients of x (..., in) and bias (out)."""
        for_x = for_bias = None
        if ctx.needs_input_grad[0]:
            # A CPU multiplies halves 10 to 100 times slower.
            dtype = torch.promote_types(grad.dtype, torch.float32) if grad.device.type == "cpu" else grad.dtype
            weight = ctx.prepared.qtensor().to(grad.device).dequantize(dtype)  # borrowed kernels keep codes on the host
            for_x = (grad.to(dtype) @ weight).to(grad.dtype)
        if ctx.needs_input_grad[1]:
            for_bias = grad.flatten(0, -2).sum(0).to(ctx.bias_dtype)
        return for_x, for_bias, None, None
