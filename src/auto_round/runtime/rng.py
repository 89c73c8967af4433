"""Random generators that depend on nothing but what they are for."""

from __future__ import annotations

import hashlib

import torch


def generator_for(seed: int, *purpose: object) -> torch.Generator:
    """A CPU generator seeded by (seed, purpose), so that a block's draws do not depend on what ran before it."""
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
