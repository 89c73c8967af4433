"""AutoRound: language models in 2, 3, 4 or 8 bits by learned rounding, in the formats other software reads."""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from auto_round.api import AutoRound as AutoRound
    from auto_round.errors import AutoRoundError as AutoRoundError
    from auto_round.inference.compiled import compile_decoding as compile_decoding
    from auto_round.inference.loading import AutoRoundConfig as AutoRoundConfig
    from auto_round.qtensor import QTensor as QTensor
    from auto_round.spec.recipe import Recipe as Recipe
    from auto_round.spec.scheme import Scheme as Scheme

__version__ = version("auto-round")

_TARGETS = {
    "AutoRound": "auto_round.api",
    "AutoRoundConfig": "auto_round.inference.loading",
    "AutoRoundError": "auto_round.errors",
    "QTensor": "auto_round.qtensor",
    "Recipe": "auto_round.spec.recipe",
    "Scheme": "auto_round.spec.scheme",
    "compile_decoding": "auto_round.inference.compiled",
}

__all__ = [
    "AutoRound",
    "AutoRoundConfig",
    "AutoRoundError",
    "QTensor",
    "Recipe",
    "Scheme",
    "__version__",
    "compile_decoding",
]


def __getattr__(name: str) -> Any:
    """Import public names when they are first used, so that importing the package does not import torch."""
    if name not in _TARGETS:
        raise AttributeError(f"module 'auto_round' has no attribute {name!r}")
    return getattr(importlib.import_module(_TARGETS[name]), name)
