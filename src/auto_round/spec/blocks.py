"""The block types of GGUF files (llama.cpp), as schemes that a Linear can have.

A row is cut into blocks of `subs` sub-blocks of `width` inputs. With codes q of `bits` bits, W' = S * (q - zero) - M:

type         S              M            stored per block
q4_0 .. q8_0 d              0            d float16
q4_1, q5_1   d              -m           d, m float16
q3_k, q6_k   d * scale      0            d float16, a signed scale of 6 or 8 bits per sub-block
q2_k .. q5_k d * scale      m * min      d, m float16, an unsigned scale and min of 4 or 6 bits per sub-block
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from auto_round.errors import SpecError
from auto_round.spec.scheme import Scheme


@dataclass(frozen=True)
class BlockScheme(Scheme):
    """One block type. `BLOCK_SCHEMES` holds all there are.

    bits: width of a code. group_size: inputs of a sub-block; subs: sub-blocks of a block. sym: without minimums. kind:
    the type's name. scales: least and largest stored sub-block scale, (1, 1) where there is none. block_bytes: size of
    a block.
    """

    kind: str = ""
    subs: int = 1
    scales: tuple[int, int] = (1, 1)
    block_bytes: int = 0

    def __post_init__(self) -> None:
        """Rows of the table below need no check, and have widths that integer schemes have not."""

    @property
    def name(self) -> str:
        """The type's name, such as q4_k."""
        return self.kind

    @property
    def zero(self) -> int:
        """Code of the value 0 in types without minimums, 0 in the others."""
        return self.mid_code if self.sym else 0

    @property
    def width(self) -> int:
        """Inputs of a sub-block."""
        return self.group_size

    @property
    def size(self) -> int:
        """Inputs of a block, which the inputs of a layer must be a multiple of."""
        return self.group_size * self.subs

    @property
    def two_level(self) -> bool:
        """True when sub-blocks have integer scales (the types called K)."""
        return self.subs > 1

    def bits_per_weight(self, in_features: int) -> float:
        """Stored bits per weight, all of the block counted; the same for every row length."""
        return 8 * self.block_bytes / self.size

    def updated(self, values: dict[str, Any]) -> BlockScheme:
        """Refuse: a block type has no fields to change, only another type's name can stand in its place."""
        raise SpecError(
            f"a layer of a GGUF file is changed by the name of another type, such as 'q6_k', not by {values}"
        )


def _types(*rows: BlockScheme) -> MappingProxyType[str, BlockScheme]:
    return MappingProxyType({row.kind: row for row in rows})


BLOCK_SCHEMES = _types(
    BlockScheme(4, 32, True, "q4_0", 1, (1, 1), 18),
    BlockScheme(4, 32, False, "q4_1", 1, (1, 1), 20),
    BlockScheme(5, 32, True, "q5_0", 1, (1, 1), 22),
    BlockScheme(5, 32, False, "q5_1", 1, (1, 1), 24),
    BlockScheme(8, 32, True, "q8_0", 1, (1, 1), 34),
    BlockScheme(2, 16, False, "q2_k", 16, (0, 15), 84),
    BlockScheme(3, 16, True, "q3_k", 16, (-32, 31), 110),
    BlockScheme(4, 32, False, "q4_k", 8, (0, 63), 144),
    BlockScheme(5, 32, False, "q5_k", 8, (0, 63), 176),
    BlockScheme(6, 16, True, "q6_k", 16, (-128, 127), 210),
)


def parse_scheme(text: str) -> Scheme:
    """Read the name of a GGUF type or of an integer scheme; raise SpecError when it is neither."""
    return BLOCK_SCHEMES[text.lower()] if text.lower() in BLOCK_SCHEMES else Scheme.parse(text)


def block_of(scheme: Scheme, in_features: int) -> BlockScheme | None:
    """The block type with exactly the grid of `scheme` for a layer with `in_features` inputs; None if there is none.

    Symmetric schemes of 4 and 8 bits in groups of 32 are q4_0 and q8_0.
    """
    if isinstance(scheme, BlockScheme):
        return scheme
    found = BLOCK_SCHEMES.get(f"q{scheme.bits}_0") if scheme.sym and scheme.group_size == 32 else None
    return None if found is None or in_features % found.size else found


def not_integer(scheme: Scheme) -> str | None:
    """Why a format of integer schemes cannot hold `scheme`, when it is a block type; else None."""
    return f"{scheme.name} is a type of GGUF files with a grid of its own" if isinstance(scheme, BlockScheme) else None


def integer_of(scheme: BlockScheme) -> Scheme | None:
    """The integer scheme with exactly the grid of a block type: that of q4_0 and q8_0, None for the others."""
    return Scheme(scheme.bits, scheme.size) if scheme.kind in ("q4_0", "q8_0") else None
