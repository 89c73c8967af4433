"""The tuning state of one Linear: rounding offsets V and range multipliers alpha, beta, moved by gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from auto_round.errors import AutoRoundError
from auto_round.numerics.groups import from_groups, to_groups
from auto_round.numerics.integer import asym_grid, asym_range, quantise, storable, sym_anchor
from auto_round.qtensor import QTensor
from auto_round.spec.scheme import Scheme
from auto_round.tune.passes import Grids, Motion, build_weight, row_chunks, step_offsets
from auto_round.tune.start import Start

# Bounds of alpha and beta. Around the full range they may only shrink it; around a searched range they are free.
PLAIN_BOUNDS = (0.0, 1.0)
SEARCHED_BOUNDS = (0.1, 2.0)


def require_finite(weight: Tensor) -> None:
    """Raise AutoRoundError when a weight of any float dtype holds NaN or infinity."""
    if not all(map(math.isfinite, weight.aminmax())):  # takes no memory, as `isfinite` does
        raise AutoRoundError("the weight holds NaN or infinity; the checkpoint is damaged or was not trained")


class TunedLayer:
    """One Linear while its block is tuned.

    The grid is s = alpha * anchor in the symmetric scheme; in the asymmetric one it is that of the range
    [beta * low, alpha * high]. `multipliers` is (2, out, groups, 1): alpha, beta.
    """

    def __init__(self, weight: Tensor, scheme: Scheme, start: Start, *, searched: bool) -> None:
        """Take the weight (out, in) in any float dtype; raise AutoRoundError when it is not finite."""
        require_finite(weight)
        self.scheme = scheme
        self.in_features = weight.shape[1]
        self.weight = to_groups(weight.float(), scheme.group_width(self.in_features))
        self.offset = torch.zeros_like(self.weight) if start.offset is None else start.offset
        self._motion: Motion | None = None  # there from the first step on
        self._bounds = SEARCHED_BOUNDS if searched else PLAIN_BOUNDS
        self.multipliers = torch.ones_like(torch.stack([start.scale, start.scale]))
        if scheme.sym:
            # The unrounded anchor keeps alpha's meaning exact; a searched scale is its own anchor.
            self._low = self._high = start.scale if searched else sym_anchor(self.weight, scheme.bits)
        elif searched:
            self._low, self._high = -start.zero * start.scale, (scheme.max_code - start.zero) * start.scale
        else:
            self._low, self._high = asym_range(self.weight)

    def grid(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point as they would be stored now: two (out, groups, 1) float32."""
        alpha, beta = self.multipliers
        if self.scheme.sym:
            scale = storable(alpha * self._high)
            return scale, torch.full_like(scale, float(self.scheme.mid_code))
        return asym_grid(beta * self._low, alpha * self._high, self.scheme.max_code)

    def write_weight(self, out: Tensor) -> None:
        """Put W' into `out` (out, in), rounded to its dtype."""
        build_weight(self.weight, self.offset, Grids(*self.grid(), self.scheme.max_code), out)

    def step(self, grad: Tensor, v_lr: float, range_lr: float) -> None:
        """Move V by at most v_lr (see `step_offsets`) and, unless it is 0, alpha and beta by range_lr against the sign
        of their gradients.

        grad: dL/dW' (out, in) in any float dtype.
        """
        scale, zero = self.grid()
        grids = Grids(scale, zero, self.scheme.max_code)
        self._motion = self._motion or Motion.of(self.offset)
        scale_grad, zero_grad = step_offsets(self.weight, self.offset, self._motion, grids, grad, v_lr)
        if range_lr:
            alpha_grad, beta_grad = self._range_gradients(scale_grad, zero_grad, scale)
            self.multipliers.sub_(torch.stack([alpha_grad, beta_grad]).sign_(), alpha=range_lr).clamp_(*self._bounds)

    def _range_gradients(self, scale_grad: Tensor, zero_grad: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Chain rule from (s, z) to (alpha, beta); with z = -beta*low/s, dz/ds = beta*low/s^2 and dz/dbeta = -low/s."""
        if self.scheme.sym:
            return scale_grad * self._high, torch.zeros_like(scale_grad)
        beta = self.multipliers[1]
        whole = scale_grad + zero_grad * beta * self._low / scale.square()
        max_code = self.scheme.max_code
        return whole * self._high / max_code, -whole * self._low / max_code - zero_grad * self._low / scale

    def qtensor(self) -> QTensor:
        """The codes, scales and zero points as they stand, on the layer's device."""
        scale, zero = self.grid()
        codes = torch.empty(self.weight.shape[0], self.in_features, dtype=torch.uint8, device=self.weight.device)
        for rows in row_chunks(self.weight):
            level = quantise(self.weight[rows], self.offset[rows], scale[rows], zero[rows], self.scheme.max_code)
            codes[rows] = from_groups(level, self.in_features).to(torch.uint8)
        zeros = None if self.scheme.sym else zero[..., 0].to(torch.uint8)
        return QTensor(codes, scale[..., 0].half(), zeros, self.scheme)
