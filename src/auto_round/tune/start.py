"""Where tuning starts: the grid of each group and, for the compensated start, the codes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from auto_round.numerics.compensate import compensated_codes, offsets_for
from auto_round.numerics.groups import expand_groups, to_groups
from auto_round.numerics.integer import asym_grid, asym_range, storable, sym_anchor
from auto_round.numerics.search import search_asym, search_sym
from auto_round.spec.scheme import Scheme

ROW_CHUNK = 1 << 18  # weights searched at a time: the passes then stay in a core's cache


@dataclass(frozen=True)
class Start:
    """Starting point of one layer, all float32.

    scale, zero: (out, groups, 1), the grid; offset: (out, groups, width) V, or None for zeros.
    """

    scale: Tensor
    zero: Tensor
    offset: Tensor | None


def plain_grid(grouped: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Scale and zero point from each group's full range; grouped: (out, groups, width)."""
    if scheme.sym:
        scale = storable(sym_anchor(grouped, scheme.bits))
        return scale, torch.full_like(scale, float(scheme.mid_code))
    return asym_grid(*asym_range(grouped), scheme.max_code)


def searched_grid(grouped: Tensor, importance: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Scale and zero point by range search, a chunk of rows at a time; importance: (in,) second moments."""
    width = grouped.shape[-1]
    weights = to_groups(importance[None], width)[0]
    rows = max(1, ROW_CHUNK // (grouped.shape[1] * width))
    scales, zeros = [], []
    for chunk in grouped.split(rows):
        if scheme.sym:
            scale = search_sym(chunk, weights, scheme.bits)
            zero = torch.full_like(scale, float(scheme.mid_code))
        else:
            scale, zero = search_asym(chunk, weights, scheme.bits)
        scales.append(scale)
        zeros.append(zero)
    return torch.cat(scales), torch.cat(zeros)


def make_start(weight: Tensor, scheme: Scheme, kind: str, moment: Tensor | None) -> Start:
    """Choose grid and offsets for a weight (out, in) float32.

    kind: "plain", "search" or "compensated" (see Recipe.start). moment: (in, in) float32 second moment of the layer's
    inputs; None when it is not known (a layer that calibration never reached), which leaves the plain search.
    """
    in_features = weight.shape[1]
    width = scheme.group_width(in_features)
    grouped = to_groups(weight, width)
    if kind == "plain":
        return Start(*plain_grid(grouped, scheme), None)
    importance = weight.new_ones(in_features) if moment is None else importance_of(moment)
    scale, zero = searched_grid(grouped, importance, scheme)
    if kind == "search" or moment is None:
        return Start(scale, zero, None)
    full_scale = expand_groups(scale[..., 0], width, in_features)
    full_zero = expand_groups(zero[..., 0], width, in_features)
    codes = compensated_codes(weight, full_scale, full_zero, scheme.max_code, moment)
    offset = to_groups(offsets_for(weight, codes, full_scale, full_zero), width)
    return Start(scale, zero, offset)


def importance_of(moment: Tensor) -> Tensor:
    """Diagonal of the second moment, with a floor so that silent channels still count a little."""
    diagonal = moment.diagonal()
    return diagonal + 1e-3 * diagonal.mean() + torch.finfo(torch.float32).tiny
