"""The state of one Linear while only its scales learn: codes and zero points stay as they are.

With W' = m * s * (q - z), s the scale that the tuner stored and m a multiplier for each group, dL/dm is the sum over
the group of dL/dW' * s * (q - z). The multipliers move by Adam (arXiv 1412.6980), so that a step means the same share
of every scale; m * s is rounded to float16, as it is stored, in every forward pass.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from auto_round.numerics.groups import expand_groups, to_groups
from auto_round.numerics.integer import storable
from auto_round.qtensor import QTensor

BETAS = (0.9, 0.95)
EPSILON = 1e-12  # the gradients of a mean loss are small


class ScaleState:
    """Multipliers (out, groups) float32 of one layer's scales, and Adam's moments of them."""

    def __init__(self, scales: Tensor) -> None:
        """Begin at the scales (out, groups) as they are stored."""
        self.scales = scales.float()
        self.multipliers = torch.ones_like(self.scales)
        self._slope, self._first, self._second = (torch.zeros_like(self.scales) for _ in range(3))

    def applied(self, tensor: QTensor) -> QTensor:
        """The layer's codes with the scales as they stand."""
        return replace(tensor, scales=storable(self.scales * self.multipliers).to(tensor.scales.dtype))

    def add(self, tensor: QTensor, grad: Tensor) -> None:
        """Take the gradient dL/dW' (out, in) of one part of a step's samples, in any float dtype."""
        width = tensor.scheme.group_width(tensor.in_features)
        zeros = expand_groups(tensor.zero_points().float(), width, tensor.in_features)
        self._slope += to_groups((tensor.codes.float() - zeros).mul_(grad.float()), width).sum(-1).mul_(self.scales)

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
