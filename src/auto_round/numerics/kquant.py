"""Grids of GGUF blocks: for each sub-block the step S and minimum M with the least weighted rounding error, then S
and M as the file can hold them, integers times the block's float16 d and m.

The weight of an input is its second moment (see `search`); an error is sum_i E[x_i^2] * (W_i - W'_i)^2. All weights are
grouped, (rows, blocks, subs, width) float32, importances (blocks, subs, width); S and M are (rows, blocks, subs, 1).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from auto_round.numerics.integer import quantise, sym_anchor
from auto_round.numerics.kpack import Fields, pack_blocks
from auto_round.numerics.search import LOWEST_SHARE, search_sym
from auto_round.spec.blocks import BlockScheme

COARSE = 12
CHUNK = 1 << 18  # weights in one pass of a search, so that the passes stay in a core's cache
SMALLEST = 2.0**-24  # of |d|: the least float16, so that a block of zeros has a step and stays zero
FACTORS = (0.88, 0.94, 1.0, 1.06)  # of d and m around the value with which the largest sub-block fits exactly


@dataclass(frozen=True)
class Grid:
    """Grid of a weight as it is stored: d, m (rows, blocks, 1, 1) float32 holding float16 values; scales, mins
    (rows, blocks, subs, 1) float32 integers. m and mins are those of `Fields`, m being None in types without."""

    d: Tensor
    m: Tensor | None
    scales: Tensor
    mins: Tensor

    def step(self) -> Tensor:
        """S of each sub-block, never 0."""
        return self.d * self.scales

    def low(self, scheme: BlockScheme) -> Tensor:
        """M of each sub-block."""
        if self.m is None:
            return torch.zeros_like(self.scales)
        return self.m * self.mins if scheme.two_level else -self.m


def half(value: Tensor) -> Tensor:
    """Round to the float16 that is stored; at least 2^-24 in magnitude, with the sign kept. Float32 in and out."""
    sign = torch.where(value < 0, -1.0, 1.0)
    return (sign * value.abs().clamp(SMALLEST, 65504.0)).half().float()


def plain_grid(weight: Tensor, scheme: BlockScheme) -> Grid:
    """Grid of the full range of each sub-block."""
    if scheme.sym:
        return _store_sym(sym_anchor(weight, scheme.bits), scheme)
    low, high = weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True)
    if scheme.two_level:
        low = low.clamp(max=0)
    return _store_min((high - low) / scheme.max_code, -low, scheme)


def search_grid(weight: Tensor, importance: Tensor, scheme: BlockScheme) -> Grid:
    """Grid with the least weighted error: sub-blocks by themselves first, then what they share."""
    if scheme.sym:
        step = search_sym(weight.flatten(1, 2), importance.flatten(0, 1), scheme.bits).reshape(*weight.shape[:3], 1)
        grid = _store_sym(step, scheme)
    else:
        step, low = _search_min(weight, importance, scheme)
        grid = _store_min(step, low, scheme)
    return _settle(weight, importance, grid, scheme) if scheme.two_level else grid


def nearest_blocks(weight: Tensor, scheme: BlockScheme, importance: Tensor | None = None) -> Tensor:
    """Search and round a weight (rows, in) float32 to the bytes of its blocks, (rows, bytes) uint8.

    importance: (in,) second moments of the inputs, None when they are not known. A few rows at a time.
    """
    chunks = []
    for rows in weight.split(max(1, CHUNK // weight.shape[1])):
        grouped = rows.unflatten(1, (-1, scheme.subs, scheme.width))
        weights = torch.ones_like(grouped[0]) if importance is None else importance.view_as(grouped[0])
        # At 8 bits there is little left to gain, and vocabularies are large.
        grid = plain_grid(grouped, scheme) if scheme.bits == 8 else search_grid(grouped, weights, scheme)
        zero = rows.new_tensor(float(scheme.zero))
        codes = quantise(grouped + grid.low(scheme), None, grid.step(), zero, scheme.max_code)
        chunks.append(pack_blocks(to_fields(grid, codes, scheme), scheme))
    return torch.cat(chunks)


def to_fields(grid: Grid, codes: Tensor, scheme: BlockScheme) -> Fields:
    """What is stored of a grid and its codes, (rows, blocks, subs, width) float32."""
    return Fields(
        codes=codes.to(torch.uint8).flatten(1),
        d=grid.d[..., 0, 0].half(),
        m=None if grid.m is None else grid.m[..., 0, 0].half(),
        scales=grid.scales[..., 0].to(torch.int16) if scheme.two_level else None,
        mins=grid.mins[..., 0].to(torch.uint8) if scheme.two_level and (not scheme.sym) else None,
    )


def block_error(weight: Tensor, importance: Tensor, grid: Grid, scheme: BlockScheme) -> Tensor:
    """Weighted squared error of each sub-block, (rows, blocks, subs, 1)."""
    step, low = grid.step(), grid.low(scheme)
    level = quantise(weight + low, None, step, weight.new_tensor(float(scheme.zero)), scheme.max_code)
    difference = level.sub_(scheme.zero).mul_(step).sub_(low).sub_(weight)
    return difference.square_().mul_(importance).sum(-1, keepdim=True)


def _store_sym(step: Tensor, scheme: BlockScheme) -> Grid:
    """The largest |S| of a block lands on the least stored scale, so d has the other sign."""
    if not scheme.two_level:
        return Grid(half(step), None, torch.ones_like(step), torch.zeros_like(step))
    least = scheme.scales[0]
    extreme = step.gather(2, step.abs().argmax(2, keepdim=True))
    d = half(extreme / least)
    return Grid(d, None, _whole(step / d, scheme), torch.zeros_like(step))


def _store_min(step: Tensor, low: Tensor, scheme: BlockScheme) -> Grid:
    if not scheme.two_level:
        return Grid(half(step), (-low).half().float(), torch.ones_like(step), torch.ones_like(step))
    most = scheme.scales[1]
    d, m = half(step.amax(2, keepdim=True) / most), half(low.amax(2, keepdim=True) / most)
    return Grid(d, m, _whole(step / d, scheme), (low / m).round().clamp(0, most))


def _whole(scales: Tensor, scheme: BlockScheme) -> Tensor:
    """Round to the integers that can be stored, but never to 0: a step of 0 gives the same values as no code set."""
    whole = scales.round().clamp(*map(float, scheme.scales))
    return torch.where(whole == 0, torch.where((scales < 0) & (scheme.scales[0] < 0), -1.0, 1.0), whole)


def _fit(weight: Tensor, importance: Tensor, level: Tensor, positive: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted least squares of W = S * level - M over the last dimension: (S, M, error); M >= 0 if `positive`."""
    weighted = importance * level
    total = importance.sum(-1, keepdim=True).expand(*level.shape[:-1], 1)
    first, second = weighted.sum(-1, keepdim=True), (weighted * level).sum(-1, keepdim=True)
    value, product = (importance * weight).sum(-1, keepdim=True), (weighted * weight).sum(-1, keepdim=True)
    power = (importance * weight * weight).sum(-1, keepdim=True)
    determinant = (total * second - first * first).clamp_min(1e-30)
    step = (total * product - first * value) / determinant
    low = (first * product - second * value) / determinant
    if positive:
        bare = product / second.clamp_min(1e-30)
        step, low = torch.where(low < 0, bare, step), low.clamp_min(0)
    error = power - 2 * step * product + 2 * low * value + step * step * second - 2 * step * low * first
    return step, low, error + low * low * total


def _search_min(weight: Tensor, importance: Tensor, scheme: BlockScheme) -> tuple[Tensor, Tensor]:
    """Best S > 0 and M of each sub-block: codes from a range of shares of the full range, S and M fitted to them."""
    low, high = weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True)
    if scheme.two_level:
        low = low.clamp(max=0)
    width, middle = (high - low).clamp_min(1e-12), (high + low) / 2
    most, positive = scheme.max_code, scheme.two_level

    def candidates() -> Iterable[tuple[Tensor, Tensor]]:
        for share in torch.linspace(LOWEST_SHARE[scheme.bits], 1.1, COARSE).tolist():
            yield width * (share / most), width * (share / 2) - middle

    zero = weight.new_zeros(())
    best = [width / most, -low, torch.full_like(width, torch.inf)]

    def consider(step: Tensor, low: Tensor) -> None:
        level = quantise(weight + low, None, step, zero, most)
        found = _fit(weight, importance, level, positive)
        better = (found[2] < best[2]) & (found[0] > 0)
        for i, value in enumerate(found):
            best[i] = torch.where(better, value, best[i])

    for step, start in candidates():
        consider(step, start)
    for _ in range(3):
        consider(best[0], best[1])
    return best[0], best[1]


def _settle(weight: Tensor, importance: Tensor, grid: Grid, scheme: BlockScheme) -> Grid:
    """Improve what is stored: other d and m for the same S and M, neighbouring integers, then d and m fitted."""
    step, low = grid.step(), grid.low(scheme)
    best = _Best(weight, importance, grid, scheme)
    for factor in FACTORS:
        d = half(grid.d * factor)
        best.whole(Grid(d, best.grid.m, _whole(step / d, scheme), best.grid.mins))
    if grid.m is not None:
        for factor in FACTORS:
            m = half(grid.m * factor)
            best.whole(Grid(best.grid.d, m, best.grid.scales, (low / m).round().clamp(0, scheme.scales[1])))
    for _ in range(2):
        best.neighbours()
        best.whole(_refit(weight, importance, best.grid, scheme))
    return best.grid


class _Best:
    """The best grid so far, and its error."""

    def __init__(self, weight: Tensor, importance: Tensor, grid: Grid, scheme: BlockScheme) -> None:
        self._weight, self._importance, self._scheme = weight, importance, scheme
        self.grid, self._error = grid, block_error(weight, importance, grid, scheme)

    def whole(self, other: Grid) -> None:
        """Take over the blocks in which `other` is better."""
        error = block_error(self._weight, self._importance, other, self._scheme)
        better = error.sum(2, keepdim=True) < self._error.sum(2, keepdim=True)
        self._take(better, other, error)

    def neighbours(self) -> None:
        """Try the integers around each sub-block's own; sub-blocks do not depend on each other here."""
        grid, scheme = self.grid, self._scheme
        shifts = [(a, b) for a in (-1, 0, 1) for b in ((-1, 0, 1) if (not scheme.sym) else (0,)) if (a, b) != (0, 0)]
        for a, b in shifts:
            scales = (grid.scales + a).clamp(*map(float, scheme.scales))
            mins = (grid.mins + b).clamp(0, scheme.scales[1]) if (not scheme.sym) else grid.mins
            other = Grid(grid.d, grid.m, torch.where(scales == 0, grid.scales, scales), mins)
            error = block_error(self._weight, self._importance, other, scheme)
            self._take(error < self._error, other, error)

    def _take(self, better: Tensor, other: Grid, error: Tensor) -> None:
        mine, per_block = self.grid, better.all(2, keepdim=True)
        self.grid = Grid(
            torch.where(per_block, other.d, mine.d),
            None if mine.m is None or other.m is None else torch.where(per_block, other.m, mine.m),
            torch.where(better, other.scales, mine.scales),
            torch.where(better, other.mins, mine.mins),
        )
        self._error = torch.where(better, error, self._error)


def _refit(weight: Tensor, importance: Tensor, grid: Grid, scheme: BlockScheme) -> Grid:
    """d and m by weighted least squares for the codes and integers as they are: W = d * (sc * level) - m * mn."""
    zero = weight.new_tensor(float(scheme.zero))
    level = quantise(weight + grid.low(scheme), None, grid.step(), zero, scheme.max_code).sub_(zero)
    x = (grid.scales * level).flatten(2)
    importance, weight = importance.flatten(1), weight.flatten(2)
    xx, xw = (importance * x * x).sum(-1), (importance * x * weight).sum(-1)
    if grid.m is None:
        d = xw / xx.clamp_min(1e-30)
        return Grid(half(torch.where(xx > 0, d, grid.d[..., 0, 0])[..., None, None]), None, grid.scales, grid.mins)
    y = grid.mins.expand_as(level).flatten(2)
    yy, xy, yw = (importance * y * y).sum(-1), (importance * x * y).sum(-1), (importance * y * weight).sum(-1)
    determinant = xx * yy - xy * xy
    solvable = determinant > 1e-6 * xx * yy
    determinant = torch.where(solvable, determinant, 1.0)
    d, m = (xw * yy - xy * yw) / determinant, (xw * xy - xx * yw) / determinant
    solvable &= (d > 0) & (m > 0)
    return Grid(
        half(torch.where(solvable, d, grid.d[..., 0, 0])[..., None, None]),
        half(torch.where(solvable, m, grid.m[..., 0, 0])[..., None, None]),
        grid.scales,
        grid.mins,
    )
