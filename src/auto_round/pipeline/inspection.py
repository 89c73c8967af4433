"""What can be wrong with weights, found before the hours that tuning takes."""

from __future__ import annotations

import torch
from torch import Tensor

from auto_round.errors import SourceError
from auto_round.numerics.groups import to_groups
from auto_round.numerics.integer import SMALLEST_SCALE
from auto_round.pipeline.job import Prepared
from auto_round.runtime.events import Listener
from auto_round.source.checkpoint import DTYPES
from auto_round.spec.scheme import Scheme

ELEMENTS = 1 << 24  # weights looked at at a time
LARGEST_SCALE = 65504.0  # of float16, in which scales are stored
TINY_SHARE = 0.01  # of a layer's groups, from which on it is worth a word


def inspect(prepared: Prepared, listener: Listener) -> None:
    """Read every weight once. Raises SourceError naming a tensor that is not finite or beyond what scales can hold.

    Warns of layers with many groups so small that the smallest scale is too coarse for them.
    """
    checkpoint = prepared.source.checkpoint
    layers = {prepared.stored_names[name]: layer for name, layer in prepared.plan.quantised.items()}
    tiny = []
    for stored, entry in checkpoint.entries.items():
        if entry.dtype not in DTYPES or not DTYPES[entry.dtype].is_floating_point or not entry.nbytes:
            continue
        layer = layers.get(stored)
        share = examine(stored, checkpoint.tensor(stored), layer.scheme if layer is not None else None)
        if share > TINY_SHARE:
            tiny.append((stored, share))
    if tiny:
        name, share = max(tiny, key=lambda item: item[1])
        listener.warn(
            f"{len(tiny)} layers have groups of weights so small that they need scales below {SMALLEST_SCALE}, the "
            f"smallest that is written: {share:.0%} of the groups of {name}; such groups lose precision"
        )


@torch.no_grad()
def examine(name: str, weight: Tensor, scheme: Scheme | None) -> float:
    """Share of groups, 0 .. 1, that are not zero and need a scale below the smallest. weight: any shape and dtype.

    Raises SourceError when the weight holds NaN or infinity, or values that no scale of `scheme` reaches.
    """
    rows = weight.reshape(weight.shape[0] if weight.dim() > 1 else 1, -1)
    tiny = groups = 0
    for part in rows.split(max(1, ELEMENTS // max(rows.shape[1], 1))):
        part = part.float()
        low, high = part.aminmax()
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            raise SourceError(f"tensor {name!r} holds NaN or infinity; the checkpoint is damaged or was not trained")
        if scheme is None or weight.dim() != 2:
            continue
        reach = LARGEST_SCALE * scheme.mid_code
        largest = max(-float(low), float(high))
        if largest > reach:
            raise SourceError(
                f"tensor {name!r} holds {largest:.3g}: with {scheme.bits} bits its scale does not fit float16; weights "
                f"may reach {reach:.3g}. Keep the layer by layer_config, or check the checkpoint"
            )
        extremes = to_groups(part, scheme.group_width(part.shape[1])).abs().amax(-1)
        tiny += int(((extremes > 0) & (extremes < SMALLEST_SCALE * scheme.mid_code)).sum())
        groups += extremes.numel()
    return tiny / groups if groups else 0.0
