"""How one Linear is quantised."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from auto_round.errors import SpecError

ALLOWED_BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class Scheme:
    """Integer weight quantisation of one Linear.

    bits: width of a code, one of 2, 3, 4, 8.
    group_size: inputs that share one scale; -1 means a whole row (per output channel).
    sym: symmetric (constant zero point, signed scale) or asymmetric (a zero point per group).

    >>> Scheme(bits=4, group_size=64).name
    'W4A16G64'
    """

    bits: int = 4
    group_size: int = 128
    sym: bool = True

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in ALLOWED_BITS:
            raise SpecError(f"bits={self.bits!r} is not supported; use one of {', '.join(map(str, ALLOWED_BITS))}")
        if isinstance(self.group_size, bool) or not isinstance(self.group_size, int):
            raise SpecError(f"group_size={self.group_size!r} must be a whole number")
        if self.group_size == 0 or self.group_size < -1:
            raise SpecError(f"group_size={self.group_size} is not valid; use 32, 64, 128, ... or -1 for one per row")
        if not isinstance(self.sym, bool):
            raise SpecError(f"sym={self.sym!r} must be true or false")

    @property
    def max_code(self) -> int:
        """Largest code, 2^bits - 1."""
        return (1 << self.bits) - 1

    @property
    def mid_code(self) -> int:
        """Constant zero point of the symmetric scheme, 2^(bits-1)."""
        return 1 << (self.bits - 1)

    @property
    def name(self) -> str:
        """Short name such as W4A16G128 or W2A16G-1 asym."""
        return f"W{self.bits}A16G{self.group_size}" + ("" if self.sym else " asym")

    def group_width(self, in_features: int) -> int:
        """Inputs per group for a layer with `in_features` inputs; never more than the row itself."""
        return in_features if self.group_size == -1 else min(self.group_size, in_features)

    def group_count(self, in_features: int) -> int:
        """Groups per row, counting a short last one."""
        return -(-in_features // self.group_width(in_features))

    def divides(self, in_features: int) -> bool:
        """True when the row is made of whole groups of the size named, as most readers need."""
        return self.group_size == -1 or in_features % self.group_size == 0

    def bits_per_weight(self, in_features: int) -> float:
        """Stored bits per weight: codes, a 16-bit scale and a zero point of `bits` bits per group."""
        return self.bits + (16 + self.bits) * self.group_count(in_features) / in_features

    @classmethod
    def parse(cls, text: str) -> Scheme:
        """Read a preset name: W4A16, W2A16G64, w8a16_g32, W3A16 (group size 128 when not named).

        Raises SpecError when the text is not of that form.
        """
        match = re.fullmatch(r"[Ww](\d+)[Aa]16(?:_?[Gg](-1|\d+))?(?:_?(sym|asym))?", text.strip())
        if match is None:
            raise SpecError(f"scheme {text!r} is not understood; write it like W4A16, W2A16G64 or W4A16G32_asym")
        bits, group_size, symmetry = match.groups()
        return cls(int(bits), int(group_size or 128), symmetry != "asym")

    def updated(self, values: dict[str, Any]) -> Scheme:
        """Return a copy with `values` (bits, group_size, sym) replaced; raise SpecError on other keys."""
        known = [f.name for f in dataclasses.fields(self)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise SpecError(f"unknown key {unknown[0]!r} in a layer's scheme; known: {', '.join(known)}")
        return dataclasses.replace(self, **values)
