"""From a weight and its scheme to the state that tuning moves, for every kind of scheme."""

from __future__ import annotations

from torch import Tensor

from auto_round.spec.blocks import BlockScheme
from auto_round.spec.scheme import Scheme
from auto_round.tune.blocklayer import BlockLayer
from auto_round.tune.layer import TunedLayer
from auto_round.tune.start import make_start

Layer = TunedLayer | BlockLayer


def start_layer(weight: Tensor, scheme: Scheme, kind: str, moment: Tensor | None) -> Layer:
    """Start tuning a weight (out, in) of any float dtype.

    kind: see Recipe.start; moment: (in, in) float32 second moment of the layer's inputs, or None. Raises AutoRoundError
    when the weight is not finite.
    """
    if isinstance(scheme, BlockScheme):
        return BlockLayer(weight, scheme, kind, moment)
    start = make_start(weight.float(), scheme, kind, moment)
    return TunedLayer(weight, scheme, start, searched=kind != "plain")
