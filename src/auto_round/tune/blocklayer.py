"""The tuning state of one Linear in GGUF blocks: rounding offsets V on the stored grid, and each block's d and m.

The integer scales and mins of the sub-blocks are searched at the start and stay. What moves is V, and multipliers alpha
of d and beta of m, which are rounded to float16 in every forward pass. So W' is what llama.cpp will compute. With the
weight shifted by M the grid is the plain W + M = S * (q - zero), and everything in `integer` and `compensate` serves.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from auto_round.numerics.compensate import Compensation, offsets_for
from auto_round.numerics.integer import quantise
from auto_round.numerics.kpack import pack_blocks
from auto_round.numerics.kquant import Grid, half, plain_grid, search_grid, to_fields
from auto_round.qtensor import BlockTensor
from auto_round.spec.blocks import BlockScheme
from auto_round.tune.columns import rounded_codes
from auto_round.tune.layer import SEARCHED_BOUNDS, require_finite
from auto_round.tune.passes import Grids, Motion, build_weight, row_chunks, step_offsets
from auto_round.tune.start import Inputs, rows_at_once


class BlockLayer:
    """One Linear while its block is tuned; the counterpart of `TunedLayer`, with the same methods.

    `multipliers` is (2, out, blocks, 1, 1): alpha, beta.
    """

    def __init__(self, weight: Tensor, scheme: BlockScheme, kind: str, inputs: Inputs | None) -> None:
        """Take the weight (out, in) in any float dtype and start as `kind` says (see Recipe.start).

        inputs: None when they are not known. Raises AutoRoundError when the weight is not finite.
        """
        require_finite(weight)
        self.scheme = scheme
        self.weight = weight.float().unflatten(1, (-1, scheme.subs, scheme.width))
        self._start = self._searched(inputs) if kind != "plain" else plain_grid(self.weight, scheme)
        self.multipliers = torch.ones_like(torch.stack([self._start.d, self._start.d]))
        self._zero = self.weight.new_full((1, 1, 1, 1), float(scheme.zero))
        self.offset = torch.zeros_like(self.weight)
        self._motion: Motion | None = None  # there from the first step on
        if inputs is not None and inputs.compensation is not None:
            self._compensate(inputs.compensation)

    def grid(self) -> Grid:
        """The grid as it would be stored now."""
        start, (alpha, beta) = self._start, self.multipliers
        m = None if start.m is None else self._stored_m(start.m * beta)
        return replace(start, d=half(start.d * alpha), m=m)

    def write_weight(self, out: Tensor) -> None:
        """Put W' into `out` (out, in), rounded to its dtype."""
        build_weight(self._grouped(self.weight), self._grouped(self.offset), self._grids(self.grid()), out)

    def step(self, grad: Tensor, v_lr: float, range_lr: float) -> None:
        """Move V by at most v_lr (see `step_offsets`) and, unless it is 0, alpha and beta by range_lr against the sign
        of their gradients.

        grad: dL/dW' (out, in) in any float dtype.
        """
        grid = self.grid()
        grids = self._grids(grid)
        weight, offset = self._grouped(self.weight), self._grouped(self.offset)
        self._motion = self._motion or Motion.of(offset)
        found = step_offsets(weight, offset, self._motion, grids, grad, v_lr)
        # W' = S * (q - zero) - M passes dM where it clamps only, which is the zero point's derivative over S.
        step_grad, low_grad = (g.view(*self.weight.shape[:-1], 1) for g in (found[0], found[1] / grids.scale))
        if range_lr:
            alpha = self._start.d * (grid.scales * step_grad).sum(2, keepdim=True)
            beta = torch.zeros_like(alpha)
            if self._start.m is not None:
                sign = 1.0 if self.scheme.two_level else -1.0
                beta = sign * self._start.m * (grid.mins * low_grad).sum(2, keepdim=True)
            self.multipliers.sub_(torch.stack([alpha, beta]).sign_(), alpha=range_lr).clamp_(*SEARCHED_BOUNDS)

    def qtensor(self) -> BlockTensor:
        """The blocks as they stand, on the layer's device."""
        grid, scheme = self.grid(), self.scheme
        step, low = grid.step(), grid.low(scheme)
        codes = torch.empty_like(self.weight, dtype=torch.uint8)
        for rows in row_chunks(self.weight):
            shifted = self.weight[rows] + low[rows]
            codes[rows] = quantise(shifted, self.offset[rows], step[rows], self._zero, scheme.max_code).to(torch.uint8)
        return BlockTensor(pack_blocks(to_fields(grid, codes, scheme), scheme), scheme)

    @staticmethod
    def _grouped(values: Tensor) -> Tensor:
        """(out, super-blocks, blocks, width) -> (out, groups, width), the same memory."""
        return values.flatten(1, -2)

    def _grids(self, grid: Grid) -> Grids:
        step, low = self._grouped(grid.step()), self._grouped(grid.low(self.scheme))
        return Grids(step, torch.full_like(step, float(self.scheme.zero)), self.scheme.max_code, low.expand_as(step))

    def _stored_m(self, m: Tensor) -> Tensor:
        return half(m) if self.scheme.two_level else m.half().float()

    def _searched(self, inputs: Inputs | None) -> Grid:
        in_features = self.weight[0].numel()
        importance = self.weight.new_ones(in_features) if inputs is None else inputs.importance
        importance = importance.view_as(self.weight[0])
        rows = rows_at_once(self.weight)
        parts = [search_grid(chunk, importance, self.scheme) for chunk in self.weight.split(rows)]
        return Grid(
            torch.cat([p.d for p in parts]),
            None if parts[0].m is None else torch.cat([p.m for p in parts if p.m is not None]),
            torch.cat([p.scales for p in parts]),
            torch.cat([p.mins for p in parts]),
        )

    def _compensate(self, known: Compensation) -> None:
        step, low = self._start.step(), self._start.low(self.scheme)
        scale = step.expand(*self.weight.shape[:-1], 1).flatten(1)
        zero = torch.full_like(scale, float(self.scheme.zero))
        shifted = (self.weight + low).flatten(1)
        codes = rounded_codes(shifted, scale, zero, self.scheme.width, self.scheme.max_code, known)
        for rows in row_chunks(self.weight):
            level = codes[rows].view_as(self.weight[rows])
            self.offset[rows] = offsets_for(self.weight[rows] + low[rows], level, step[rows], self._zero)
