"""Large layers that a folder keeps in bfloat16, above all the output head: one token goes through the native kernel.

It reads such a weight as fast as memory gives it. torch's own product with one token does so on some CPUs; on others it
takes twice the time.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from auto_round.inference.backends.native import BACKEND
from auto_round.inference.base import Reason, tracing
from auto_round.inference.kernels.native import library, native_dense, operator_dense
from auto_round.inference.select import requested

LEAST_WEIGHTS = 1 << 22  # smaller ones stay in a cache, where torch is as fast


class DenseLinear(nn.Linear):
    """A Linear whose bfloat16 weight meets lone tokens in the native kernel, where no gradient is wanted."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        if tracing():  # what it records runs for other numbers of tokens too
            return super().forward(x)
        tensors = [x, self.weight] + ([] if self.bias is None else [self.bias])
        fits = all(t.dtype is torch.bfloat16 and t.device.type == "cpu" for t in tensors)
        alone = x.shape[-1] == x.numel() == self.in_features
        if not fits or not alone or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
            return super().forward(x)
        multiply = operator_dense if torch.compiler.is_compiling() else native_dense
        return multiply(x, self.weight, self.bias)


def use_native_for_dense(model: nn.Module, spelling: str) -> None:
    """Make `DenseLinear`s of the large bfloat16 Linears of `model` if the backends of `spelling` include the kernel.

    The modules stay the same objects, with their weights, ties and hooks.
    """
    if BACKEND not in requested(spelling) or isinstance(library(), Reason):
        return
    for module in model.modules():
        if (
            type(module) is nn.Linear
            and module.weight.numel() >= LEAST_WEIGHTS
            and module.weight.dtype is torch.bfloat16
        ):
            module.__class__ = DenseLinear
