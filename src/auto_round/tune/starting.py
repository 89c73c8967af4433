"""From a weight and its scheme to the state that tuning moves, for every kind of scheme."""

from __future__ import annotations

from torch import Tensor

from auto_round.spec.blocks import BlockScheme
from auto_round.spec.scheme import Scheme
from auto_round.tune.blocklayer import BlockLayer
from auto_round.tune.layer import TunedLayer
from auto_round.tune.start import Inputs, make_start

Layer = TunedLayer | BlockLayer


def start_layer(weight: Tensor, scheme: Scheme, kind: str, inputs: Inputs | None) -> Layer:
    """Start tuning a weight (out, in) of any float dtype.

    kind: see Recipe.start; inputs: None when they are not known. Raises AutoRoundError when the weight is not finite.
    """
    weight = weight.float()
    if isinstance(scheme, BlockScheme):
        return BlockLayer(weight, scheme, kind, inputs)
    start = make_start(weight, scheme, kind, inputs)
    return TunedLayer(weight, scheme, start, searched=kind != "plain")
