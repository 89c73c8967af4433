"""The hub type: what the tuner makes, every writer encodes, every reader returns and every backend prepares from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from auto_round.errors import FormatError
from auto_round.numerics.groups import expand_groups
from auto_round.spec.scheme import Scheme


@dataclass(frozen=True)
class QTensor:
    """A quantised weight. W[o, i] = scales[o, k] * (codes[o, i] - zeros[o, k]) with k = i // group width.

    codes: (out, in) uint8, values 0 .. 2^bits-1.
    scales: (out, groups) float16; may be negative in the symmetric scheme.
    zeros: (out, groups) uint8, values 0 .. 2^bits-1; None in the symmetric scheme, where it is 2^(bits-1) throughout.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    scheme: Scheme

    def __post_init__(self) -> None:
        out_features, in_features = self.codes.shape
        grid = (out_features, self.scheme.group_count(in_features))
        if self.codes.dtype != torch.uint8:
            raise FormatError(f"codes have dtype {self.codes.dtype}, expected uint8")
        if tuple(self.scales.shape) != grid:
            raise FormatError(f"scales have shape {tuple(self.scales.shape)}, expected {grid}")
        if (self.zeros is None) != self.scheme.sym:
            raise FormatError(f"zero points are {'missing' if self.zeros is None else 'given'} with {self.scheme}")
        if self.zeros is not None and tuple(self.zeros.shape) != grid:
            raise FormatError(f"zero points have shape {tuple(self.zeros.shape)}, expected {grid}")

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        """Columns of the weight, without padding."""
        return self.codes.shape[1]

    def zero_points(self) -> Tensor:
        """(out, groups) uint8 zero points, also for the symmetric scheme."""
        if self.zeros is not None:
            return self.zeros
        return torch.full(self.scales.shape, self.scheme.mid_code, dtype=torch.uint8, device=self.scales.device)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight (out, in): exact in float32, then rounded to `dtype`."""
        width = self.scheme.group_width(self.in_features)
        offsets = expand_groups(self.zero_points(), width, self.in_features)
        scales = expand_groups(self.scales.float(), width, self.in_features)
        return ((self.codes.to(torch.int16) - offsets).float() * scales).to(dtype)

    def same(self, other: QTensor) -> bool:
        """True when codes, scales and zero points are bit-identical."""
        return (
            self.scheme == other.scheme
            and torch.equal(self.codes, other.codes)
            and torch.equal(self.scales, other.scales)
            and torch.equal(self.zero_points(), other.zero_points())
        )
