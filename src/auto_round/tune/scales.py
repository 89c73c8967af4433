"""The state of one Linear while only its scales learn: codes and zero points stay as they are.

What is stored as a float learns: the scales of integer schemes, d and m of GGUF blocks, whose integer scales and mins
stay. W' is linear in them; with m a multiplier of one, dL/dm is the sum over the weights it serves of dL/dW' times its
part of W'. The multipliers move by Adam (arXiv 1412.6980), so that a step means the same share of every scale; what
comes of them is rounded to float16, as it is stored, in every forward pass.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from auto_round.numerics.groups import expand_groups, to_groups
from auto_round.numerics.integer import storable
from auto_round.numerics.kpack import Fields, block_grid, dequantise_blocks, pack_blocks
from auto_round.numerics.kquant import half
from auto_round.qtensor import BlockTensor, QTensor, QuantTensor
from auto_round.spec.blocks import BlockScheme
from auto_round.spec.scheme import Scheme

BETAS = (0.9, 0.95)
EPSILON = 1e-12  # the gradients of a mean loss are small


def learned_count(scheme: Scheme, in_features: int) -> int:
    """How many stored scales a row of so many inputs has that can learn."""
    if isinstance(scheme, BlockScheme):
        return in_features // scheme.size * (1 if scheme.sym else 2)
    return scheme.group_count(in_features)


class ScaleState:
    """Multipliers (kinds, out, groups) float32 of one layer's stored scales, and Adam's moments of them.

    kinds: the scales alone, or d, or d and m.
    """

    def __init__(self, tensor: QuantTensor) -> None:
        """Begin at the scales of `tensor`, on its device."""
        self.bits = tensor.scheme.bits
        self.multipliers = torch.ones_like(_stored(tensor))
        self._slope, self._first, self._second = (torch.zeros_like(self.multipliers) for _ in range(3))

    def weight(self, tensor: QuantTensor) -> Tensor:
        """W' (out, in) float32 of the layer's codes, with the scales as they stand."""
        if isinstance(tensor, BlockTensor):
            return dequantise_blocks(self._fields(tensor), tensor.scheme)
        return self._scaled(tensor).dequantize()

    def applied(self, tensor: QuantTensor) -> QuantTensor:
        """The layer's codes with the scales as they stand."""
        if isinstance(tensor, BlockTensor):
            return replace(tensor, data=pack_blocks(self._fields(tensor), tensor.scheme))
        return self._scaled(tensor)

    def add(self, tensor: QuantTensor, grad: Tensor) -> None:
        """Take the gradient dL/dW' (out, in) of one part of a step's samples, in any float dtype."""
        self._slope += _block_slopes(tensor, grad) if isinstance(tensor, BlockTensor) else _slopes(tensor, grad)

    def step(self, lr: float, count: int) -> None:
        """Step number `count`, from 1, of size `lr`, a share of each scale, against what was added since the last."""
        self._first.lerp_(self._slope, 1 - BETAS[0])
        self._second.lerp_(self._slope.square(), 1 - BETAS[1])
        self._slope.zero_()
        first, second = self._first / (1 - BETAS[0] ** count), self._second / (1 - BETAS[1] ** count)
        self.multipliers.sub_(first.div_(second.sqrt_().add_(EPSILON)), alpha=lr)

    def parts(self) -> dict[str, Tensor]:
        """All that goes on to the next step, by name; written to, it goes on from there."""
        return {"multipliers": self.multipliers, "first": self._first, "second": self._second}

    def _scaled(self, tensor: QTensor) -> QTensor:
        return replace(tensor, scales=storable(tensor.scales.float() * self.multipliers[0]).to(tensor.scales.dtype))

    def _fields(self, tensor: BlockTensor) -> Fields:
        fields = tensor.fields()
        d = half(fields.d.float() * self.multipliers[0]).half()
        if fields.m is None:
            return replace(fields, d=d)
        largest = torch.finfo(torch.float16).max
        return replace(fields, d=d, m=(fields.m.float() * self.multipliers[1]).clamp(-largest, largest).half())


def _stored(tensor: QuantTensor) -> Tensor:
    """The scales that can learn, (kinds, out, groups) float32."""
    if isinstance(tensor, BlockTensor):
        fields = tensor.fields()
        return torch.stack([fields.d] if fields.m is None else [fields.d, fields.m]).float()
    return tensor.scales.float()[None]


def _slopes(tensor: QTensor, grad: Tensor) -> Tensor:
    """dL/d(multipliers) at 1, (1, out, groups)."""
    width = tensor.scheme.group_width(tensor.in_features)
    zeros = expand_groups(tensor.zero_points().float(), width, tensor.in_features)
    sums = to_groups((tensor.codes.float() - zeros).mul_(grad.float()), width).sum(-1)
    return sums.mul_(tensor.scales.float())[None]


def _block_slopes(tensor: BlockTensor, grad: Tensor) -> Tensor:
    """The same for blocks, (1 or 2, out, blocks): W' = S (q - zero) - M, S being linear in d and M in m."""
    scheme, fields = tensor.scheme, tensor.fields()
    step, low = block_grid(fields, scheme)
    grouped = grad.float().unflatten(1, (-1, scheme.subs, scheme.width))
    level = fields.codes.view_as(grouped).float() - scheme.zero
    by_d = (step * (level * grouped).sum(-1)).sum(-1)
    return torch.stack([by_d] if fields.m is None else [by_d, -(low * grouped.sum(-1)).sum(-1)])
