"""Integer fake quantisation and its gradient in closed form.

All weights are grouped, (out, groups, width) float32; scales and zero points are (out, groups, 1) float32. With codes
q = clamp(round(W/s + V) + z, 0, M) and W' = s * (q - z), the straight-through estimator (SignRound, arXiv 2309.05516)
passes gradients of V and z through round everywhere and through clamp inside the range only; s meets the codes as they
are, which V moves already (SignRound takes inside * W/s away; that ends 4 to 7% worse, see docs/ablations.md):

    dW'/dV = s * inside        dW'/ds = q - z        dW'/dz = s * (inside - 1)

so G = dL/dW' is all that has to come out of the block's backward pass. The symmetric scheme is z = 2^(bits-1).
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST_SCALE = 1e-5  # floor of |s|; float16, subnormal there, still has it to 0.3%


def storable(scale: Tensor) -> Tensor:
    """Round scales to the float16 they are stored in, |s| at least 1e-5 with the sign kept. Any shape, float32."""
    sign = torch.where(scale < 0, -1.0, 1.0)
    return (sign * scale.abs().clamp(SMALLEST_SCALE, 65504.0)).half().float()


def sym_anchor(weight: Tensor, bits: int) -> Tensor:
    """Signed full-range scale: the largest-magnitude value of a group lands on code -2^(bits-1).

    weight: (out, groups, width). Returns (out, groups, 1), negative where that value is positive.
    """
    low, high = weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True)
    extreme = torch.where(high >= -low, high, low)
    return extreme / -float(1 << (bits - 1))


def asym_range(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(low, high) of each group, each (out, groups, 1), with low <= 0 <= high."""
    return weight.amin(-1, keepdim=True).clamp(max=0), weight.amax(-1, keepdim=True).clamp(min=0)


def asym_grid(low: Tensor, high: Tensor, max_code: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the range [low, high]: s = (high - low) / M as stored, z = round(-low / s) in 0..M."""
    scale = storable((high - low) / max_code)
    return scale, (-low / scale).round().clamp(0, max_code)


def quantise(weight: Tensor, offset: Tensor | None, scale: Tensor, zero: Tensor, max_code: int) -> Tensor:
    """Codes as float32: clamp(round(W/s + V) + z, 0, M). offset is V, None for zeros."""
    ratio = weight / scale
    if offset is not None:
        ratio += offset
    return ratio.round_().add_(zero).clamp_(0, max_code)


def fake_quantise(weight: Tensor, offset: Tensor | None, scale: Tensor, zero: Tensor, max_code: int) -> Tensor:
    """W' = s * (q - z)."""
    return quantise(weight, offset, scale, zero, max_code).sub_(zero).mul_(scale)


def gradients(
    weight: Tensor, offset: Tensor, scale: Tensor, zero: Tensor, max_code: int, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dL/dV up to the positive factor |s|, dL/ds and dL/dz for grad = dL/dW'.

    Shapes: (out, groups, width), (out, groups, 1), (out, groups, 1); float32.
    """
    level = (weight / scale).add_(offset).round_().add_(zero)
    clamped = level.clamp(0, max_code)
    inside = (level == clamped).to(weight.dtype)
    grad_inside = grad * inside
    scale_grad = (grad * clamped.sub_(zero)).sum(-1, keepdim=True)
    zero_grad = scale * (grad_inside - grad).sum(-1, keepdim=True)
    return grad_inside.mul_(torch.sign(scale)), scale_grad, zero_grad
