"""Range search: for each group the scale (and zero point) with the least weighted rounding error.

The weight of an input channel is its second moment E[x_i^2] over the calibration tokens (an "imatrix"), so the error
is that of the layer's output with channels taken as independent: sum_i E[x_i^2] * (W_i - W'_i)^2.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from auto_round.numerics.integer import asym_range, quantise, storable

# Smallest share of the full range worth trying: fewer codes gain more from clipping.
LOWEST_SHARE = {2: 0.30, 3: 0.50, 4: 0.60, 5: 0.70, 6: 0.80, 8: 0.90}
COARSE, FINE = 12, 4


def _shares(bits: int, highest: float) -> list[float]:
    return torch.linspace(LOWEST_SHARE[bits], highest, COARSE).tolist()


def _error(weight: Tensor, importance: Tensor, scale: Tensor, zero: Tensor, max_code: int) -> tuple[Tensor, Tensor]:
    """Weighted squared error (out, groups, 1), and the least-squares scale for the same codes."""
    level = quantise(weight, None, scale, zero, max_code).sub_(zero)
    weighted = importance * level
    fit = (weighted * weight).sum(-1, keepdim=True)
    power = (weighted.mul_(level)).sum(-1, keepdim=True)
    total = (importance * weight * weight).sum(-1, keepdim=True)
    error = total - 2 * scale * fit + scale * scale * power
    return error, torch.where(power > 0, fit / power.clamp_min(1e-30), scale)


def _best_of(
    weight: Tensor, importance: Tensor, candidates: Iterable[tuple[Tensor, Tensor]], max_code: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (error, scale, zero) of the best candidate per group; each candidate also in its least-squares fit."""
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for scale, zero in candidates:
        scale = storable(scale)
        error, _ = _error(weight, importance, scale, zero, max_code)
        if best is None:
            best = error, scale, zero.expand_as(scale).clone()
        else:
            better = error < best[0]
            best = (
                torch.where(better, error, best[0]),
                torch.where(better, scale, best[1]),
                torch.where(better, zero, best[2]),
            )
    assert best is not None
    return best


def _refine(
    weight: Tensor, importance: Tensor, best: tuple[Tensor, Tensor, Tensor], step: float, max_code: int
) -> tuple[Tensor, Tensor]:
    """Search around each group's best scale, then take the least-squares scale where it is better still."""
    _, scale, zero = best
    near = [1 + step * (k - FINE / 2) / FINE for k in range(FINE + 1)]
    best = _best_of(weight, importance, ((scale * factor, zero) for factor in near), max_code)
    for _ in range(2):
        _, fit = _error(weight, importance, best[1], best[2], max_code)
        best = _best_of(weight, importance, [(best[1], best[2]), (fit, best[2])], max_code)
    return best[1], best[2]


def search_sym(weight: Tensor, importance: Tensor, bits: int) -> Tensor:
    """Best signed scale of each group.

    weight: (out, groups, width) float32; importance: (groups, width) >= 0, or (1, 1) of ones.
    Returns (out, groups, 1), already rounded to float16.
    """
    max_code = (1 << bits) - 1
    zero = weight.new_full((1, 1, 1), float(1 << (bits - 1)))
    full = weight.abs().amax(-1, keepdim=True) / (1 << (bits - 1))
    shares = _shares(bits, 1.15)
    candidates = ((full * (share * sign), zero) for share in shares for sign in (1.0, -1.0))
    best = _best_of(weight, importance, candidates, max_code)
    return _refine(weight, importance, best, shares[1] - shares[0], max_code)[0]


def search_asym(weight: Tensor, importance: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Best scale and integer zero point of each group; shapes as in `search_sym`, zero points in 0 .. 2^bits-1."""
    max_code = (1 << bits) - 1
    low, high = asym_range(weight)
    shares = _shares(bits, 1.05)

    def candidates() -> Iterable[tuple[Tensor, Tensor]]:
        for share in shares:
            scale = storable((high - low) * (share / max_code))
            middle = (max_code / 2 - (low + high) / (2 * scale)).round()
            for shift in (-1, 0, 1):
                yield scale, (middle + shift).clamp(0, max_code)

    best = _best_of(weight, importance, candidates(), max_code)
    return _refine(weight, importance, best, shares[1] - shares[0], max_code)
