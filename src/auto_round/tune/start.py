"""Where tuning starts: the grid of each group and, for the compensated start, the codes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from auto_round.numerics.compensate import SILENT, Compensation, compensation, offsets_for
from auto_round.numerics.groups import expand_groups, to_groups
from auto_round.numerics.integer import asym_grid, asym_range, storable, sym_anchor
from auto_round.numerics.search import search_asym, search_sym
from auto_round.spec.scheme import Scheme
from auto_round.tune.columns import rounded_codes
from auto_round.tune.moments import Moment

ROW_CHUNK = 1 << 18  # weights searched at a time: the passes then stay in a core's cache


@dataclass(frozen=True)
class Start:
    """Starting point of one layer, all float32.

    scale, zero: (out, groups, 1), the grid; offset: (out, groups, width) V, or None for zeros.
    """

    scale: Tensor
    zero: Tensor
    offset: Tensor | None


@dataclass(frozen=True)
class Inputs:
    """What is known of the inputs that some layers share.

    importance: (in,) float32, see `importance_of`. compensation: None where the start does not ask for it.
    """

    importance: Tensor
    compensation: Compensation | None


def inputs_from(moment: Moment | None, kind: str) -> Inputs | None:
    """What the start `kind` needs of the inputs' second moment; None for None. Raises AutoRoundError if not finite."""
    if moment is None:
        return None
    compensated = kind == "compensated"
    return Inputs(importance_of(moment.mean), compensation(moment.mean, shrinkage_of(moment)) if compensated else None)


def shrinkage_of(moment: Moment) -> float:
    """Share of its diagonal to be added to a moment: two inputs per token, at most 1.

    A moment of few tokens has directions that look silent and are not; errors moved into them show on other text.
    The fewer tokens there are for an input, the nearer to its diagonal the moment has to be (the idea is Ledoit and
    Wolf's, doi 10.1016/S0047-259X(03)00096-4, the rule what was measured, docs/ablations.md).
    """
    return min(2 * len(moment.mean) / moment.tokens, 1.0)


def importance_of(moment: Tensor) -> Tensor:
    """Diagonal of the second moment, with a floor so that silent channels still count a little."""
    diagonal = moment.diagonal()
    return diagonal + 1e-3 * diagonal.mean() + SILENT


def plain_grid(grouped: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Scale and zero point from each group's full range; grouped: (out, groups, width)."""
    if scheme.sym:
        scale = storable(sym_anchor(grouped, scheme.bits))
        return scale, torch.full_like(scale, float(scheme.mid_code))
    return asym_grid(*asym_range(grouped), scheme.max_code)


def rows_at_once(weight: Tensor) -> int:
    """Rows of `weight` in one pass of a search; more on accelerators, whose launches cost more than a cache saves."""
    return max(1, (ROW_CHUNK if weight.device.type == "cpu" else 16 * ROW_CHUNK) // weight[0].numel())


def searched_grid(grouped: Tensor, importance: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Scale and zero point by range search, a chunk of rows at a time; importance: (in,) second moments."""
    width = grouped.shape[-1]
    weights = to_groups(importance[None], width)[0]
    scales, zeros = [], []
    for chunk in grouped.split(rows_at_once(grouped)):
        if scheme.sym:
            scale = search_sym(chunk, weights, scheme.bits)
            zero = torch.full_like(scale, float(scheme.mid_code))
        else:
            scale, zero = search_asym(chunk, weights, scheme.bits)
        scales.append(scale)
        zeros.append(zero)
    return torch.cat(scales), torch.cat(zeros)


def make_start(weight: Tensor, scheme: Scheme, kind: str, inputs: Inputs | None) -> Start:
    """Choose grid and offsets for a weight (out, in) float32.

    kind: "plain", "search" or "compensated" (see Recipe.start). inputs: None when they are not known (a layer that
    calibration never reached), which leaves the plain search.
    """
    in_features = weight.shape[1]
    width = scheme.group_width(in_features)
    grouped = to_groups(weight, width)
    if kind == "plain":
        return Start(*plain_grid(grouped, scheme), None)
    importance = weight.new_ones(in_features) if inputs is None else inputs.importance
    scale, zero = searched_grid(grouped, importance, scheme)
    if inputs is None or inputs.compensation is None:
        return Start(scale, zero, None)
    scales, zeros = scale[..., 0], zero[..., 0]
    offset = rounded_codes(weight, scales, zeros, width, scheme.max_code, inputs.compensation)
    for begin in range(0, len(weight), rows := rows_at_once(weight)):
        part = slice(begin, begin + rows)
        steps, shifts = (expand_groups(values[part], width, in_features) for values in (scales, zeros))
        offset[part] = offsets_for(weight[part], offset[part], steps, shifts)
    return Start(scale, zero, to_groups(offset, width))
