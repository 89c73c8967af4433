"""Quantising one Linear by itself, without steps: round-to-nearest layers, and heads too large to tune."""

from __future__ import annotations

import torch
from torch import Tensor

from auto_round.qtensor import QuantTensor, joined
from auto_round.spec.scheme import Scheme
from auto_round.tune.start import Inputs
from auto_round.tune.starting import start_layer

# Rows do not depend on each other, so taking some at a time bounds memory and changes nothing.
ELEMENTS = 1 << 22  # weights at a time
COMPENSATED_ROWS = 4096  # rows at a time where a column's work is short and its call is what costs


@torch.no_grad()
def quantise_alone(
    weight: Tensor, scheme: Scheme, kind: str, inputs: Inputs | None, device: torch.device
) -> QuantTensor:
    """Codes of the starting point `kind` (see Recipe.start) for a weight (out, in) of any float dtype, on the host.

    inputs: what is known of them, on `device`, or None. Raises AutoRoundError when the weight is not finite.
    """
    lot = max(1, ELEMENTS // weight.shape[1]) if inputs is None else COMPENSATED_ROWS
    return joined([start_layer(rows.to(device), scheme, kind, inputs).qtensor() for rows in weight.split(lot)])
