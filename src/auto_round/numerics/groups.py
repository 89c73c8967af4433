"""Rows of a weight split into groups along the inputs."""

from __future__ import annotations

import torch
from torch import Tensor


def to_groups(weight: Tensor, width: int) -> Tensor:
    """(out, in) -> (out, groups, width); a short last group is padded with zeros (a view when nothing is short)."""
    out_features, in_features = weight.shape
    short = -in_features % width
    if short:
        weight = torch.nn.functional.pad(weight, (0, short))
    return weight.reshape(out_features, -1, width)


def from_groups(grouped: Tensor, in_features: int) -> Tensor:
    """(out, groups, width) -> (out, in_features): the inverse of `to_groups`, padding cut off."""
    return grouped.flatten(1)[:, :in_features]


def expand_groups(values: Tensor, width: int, in_features: int) -> Tensor:
    """(out, groups) -> (out, in_features): each group's value repeated for its inputs."""
    return values.repeat_interleave(width, dim=1)[:, :in_features]
