"""What cannot be seen in a model's modules, as data: one JSON file a kind of fact.

classes.json    linear: subclasses of nn.Linear that compute x @ W^T + b and nothing else
                transposed_experts: classes whose stacked weights are [experts, in, out] and that do not say so
                run_all_experts: classes that multiply every token by every expert
names.json      routers: regular expressions of Linears that choose experts, and stay as they are
                read_directly: of Linears whose weight the model uses without calling them (the step sizes of Mamba)
                steering: of Linears with few outputs that weigh the streams of a block
                nontext: regular expressions of what works on images or sound, also where it lies in the text model
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files


@cache
def quirk(file: str, key: str) -> tuple[str, ...]:
    """The list `key` of ``<file>.json``."""
    return tuple(json.loads((files(__name__) / f"{file}.json").read_text(encoding="utf-8"))[key])
