"""The bytes of GGUF blocks: codes, scales and mins to rows of bytes and back (ggml's block structures).

A code is cut into planes of neighbouring bits. Within a plane, the block is a run of sections, a section is `parts`
parts of `width` codes, and byte l of a section holds code l of every part, part k at bit k * bits:

type          bytes of a block, in order
q4_0          d(2) low(16)                     low: 4 bits, 2 parts of 16
q4_1          d(2) m(2) low(16)
q5_0          d(2) high(4) low(16)             high: 1 bit, 8 parts of 1
q5_1          d(2) m(2) high(4) low(16)
q8_0          d(2) low(32)                     low: 8 bits signed, which is the code with its top bit flipped
q2_k          scales(16) low(64) d(2) m(2)     low: 2 bits, 4 parts of 32; scales: scale | min << 4
q3_k          high(32) low(64) scales(12) d(2) low as in q2_k; high: 1 bit, 8 parts of 32; scales + 32 in 6 bits
q4_k          d(2) m(2) scales(12) low(128)    low: 4 bits, 2 parts of 32; scales and mins of 6 bits
q5_k          d(2) m(2) scales(12) high(32) low(128)   high: 1 bit, 8 parts of 32
q6_k          low(128) high(64) scales(16) d(2)        low: 4 bits, 2 parts of 64; high: 2 bits, 4 parts of 32
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from auto_round.spec.blocks import BlockScheme


@dataclass(frozen=True)
class Fields:
    """What the blocks of a weight (out, in) hold, `blocks` being in / block size.

    codes: (out, in) uint8. d: (out, blocks) float16. m: (out, blocks) float16, as stored (added in q4_1 and q5_1,
    multiplied by the min and subtracted in K types); None in types without. scales: (out, blocks, subs) int16; mins:
    (out, blocks, subs) uint8; None in types without.
    """

    codes: Tensor
    d: Tensor
    m: Tensor | None
    scales: Tensor | None
    mins: Tensor | None


@dataclass(frozen=True)
class Plane:
    """Bits shift .. shift + bits - 1 of the codes, laid out as described at the top of this file."""

    shift: int
    bits: int
    parts: int
    width: int

    def pack(self, codes: Tensor) -> Tensor:
        """codes (..., size) uint8 -> bytes (..., size * bits / 8)."""
        part = (codes >> self.shift) & ((1 << self.bits) - 1)
        return _join(part.unflatten(-1, (-1, self.parts, self.width)), self.bits).flatten(-2)

    def unpack(self, data: Tensor) -> Tensor:
        """The plane's contribution to the codes, (..., size) uint8."""
        return _split(data.unflatten(-1, (-1, self.width)), self.parts, self.bits).flatten(-3) << self.shift


def _join(parts: Tensor, bits: int) -> Tensor:
    """(..., n, w) -> (..., w) uint8, part k shifted by k * bits."""
    joined = parts[..., 0, :].clone()
    for k in range(1, parts.shape[-2]):
        joined |= parts[..., k, :] << (k * bits)
    return joined


def _split(data: Tensor, parts: int, bits: int) -> Tensor:
    """(..., w) uint8 -> (..., parts, w): the inverse of `_join`."""
    return torch.stack([(data >> (k * bits)) & ((1 << bits) - 1) for k in range(parts)], dim=-2)


@dataclass(frozen=True)
class Layout:
    """Planes by name, and the fields in file order with their sizes in bytes."""

    order: tuple[tuple[str, int], ...]
    planes: MappingProxyType[str, Plane]


def _layout(order: str, low: Plane, high: Plane | None = None, low_bytes: int = 16, high_bytes: int = 4) -> Layout:
    sizes = {"d": 2, "m": 2, "low": low_bytes, "high": high_bytes, "scales": 12, "pairs": 16, "bytes": 16}
    planes = {"low": low} if high is None else {"low": low, "high": high}
    return Layout(tuple((field, sizes[field]) for field in order.split()), MappingProxyType(planes))


_NIBBLES, _HIGH32 = Plane(0, 4, 2, 16), Plane(4, 1, 8, 1)
_PAIRS, _NIBBLES_K = Plane(0, 2, 4, 32), Plane(0, 4, 2, 32)

LAYOUTS = MappingProxyType(
    {
        "q4_0": _layout("d low", _NIBBLES),
        "q4_1": _layout("d m low", _NIBBLES),
        "q5_0": _layout("d high low", _NIBBLES, _HIGH32),
        "q5_1": _layout("d m high low", _NIBBLES, _HIGH32),
        "q8_0": _layout("d low", Plane(0, 8, 1, 32), low_bytes=32),
        "q2_k": _layout("pairs low d m", _PAIRS, low_bytes=64),
        "q3_k": _layout("high low scales d", _PAIRS, Plane(2, 1, 8, 32), low_bytes=64, high_bytes=32),
        "q4_k": _layout("d m scales low", _NIBBLES_K, low_bytes=128),
        "q5_k": _layout("d m scales high low", _NIBBLES_K, Plane(4, 1, 8, 32), low_bytes=128, high_bytes=32),
        "q6_k": _layout("low high bytes d", Plane(0, 4, 2, 64), Plane(4, 2, 4, 32), low_bytes=128, high_bytes=64),
    }
)


def pack_blocks(fields: Fields, scheme: BlockScheme) -> Tensor:
    """Return the rows of bytes, (out, in / block size * block bytes) uint8."""
    codes = fields.codes.unflatten(1, (-1, scheme.size))
    if scheme.name == "q8_0":
        codes = codes ^ 0x80
    layout = LAYOUTS[scheme.name]
    pieces = [
        layout.planes[field].pack(codes) if field in layout.planes else _FIELDS[field][0](fields)
        for field, _ in layout.order
    ]
    return torch.cat(pieces, dim=-1).flatten(1)


def unpack_blocks(data: Tensor, scheme: BlockScheme) -> Fields:
    """Inverse of `pack_blocks`: data (out, blocks * block bytes) uint8."""
    blocks = data.unflatten(1, (-1, scheme.block_bytes))
    layout, position, codes = LAYOUTS[scheme.name], 0, None
    found: dict[str, Tensor] = {}
    for field, size in layout.order:
        piece = blocks[..., position : position + size]
        position += size
        if field in layout.planes:
            plane = layout.planes[field].unpack(piece)
            codes = plane if codes is None else codes | plane
        else:
            found |= _FIELDS[field][1](piece, scheme)
    assert codes is not None
    if scheme.name == "q8_0":
        codes = codes ^ 0x80
    return Fields(codes.flatten(1), found["d"], found.get("m"), found.get("scales"), found.get("mins"))


def _half(name: str) -> tuple[Callable[[Fields], Tensor], Callable[[Tensor, BlockScheme], dict[str, Tensor]]]:
    def write(fields: Fields) -> Tensor:
        value: Tensor = getattr(fields, name)
        return value[..., None].contiguous().view(torch.uint8)

    return write, lambda piece, _: {name: piece.contiguous().view(torch.float16)[..., 0]}


def _write_pairs(fields: Fields) -> Tensor:
    """Scale in the low nibble, min in the high one: 16 bytes of 16 sub-blocks."""
    assert fields.scales is not None
    assert fields.mins is not None
    return fields.scales.to(torch.uint8) | (fields.mins << 4)


def _read_pairs(piece: Tensor, _: BlockScheme) -> dict[str, Tensor]:
    return {"scales": (piece & 15).to(torch.int16), "mins": piece >> 4}


def _write_bytes(fields: Fields) -> Tensor:
    assert fields.scales is not None
    return fields.scales.to(torch.int8).contiguous().view(torch.uint8)


def _read_bytes(piece: Tensor, _: BlockScheme) -> dict[str, Tensor]:
    return {"scales": piece.contiguous().view(torch.int8).to(torch.int16)}


def _write_six(fields: Fields) -> Tensor:
    """12 bytes: 16 scales of q3_k, or 8 scales and 8 mins of q4_k and q5_k."""
    assert fields.scales is not None
    if fields.mins is None:
        u = (fields.scales + 32).to(torch.uint8)
        return torch.cat([_join(u.unflatten(-1, (2, 8)) & 15, 4), _join(u.unflatten(-1, (4, 4)) >> 4, 2)], dim=-1)
    scales, mins = fields.scales.to(torch.uint8), fields.mins
    return torch.cat(
        [
            scales[..., :4] | (scales[..., 4:] >> 4 << 6),
            mins[..., :4] | (mins[..., 4:] >> 4 << 6),
            (scales[..., 4:] & 15) | ((mins[..., 4:] & 15) << 4),
        ],
        dim=-1,
    )


def _read_six(piece: Tensor, scheme: BlockScheme) -> dict[str, Tensor]:
    if scheme.sym:
        u = _split(piece[..., :8], 2, 4).flatten(-2) | (_split(piece[..., 8:], 4, 2).flatten(-2) << 4)
        return {"scales": u.to(torch.int16) - 32}
    first, second, third = piece[..., :4], piece[..., 4:8], piece[..., 8:]
    scales = torch.cat([first & 63, (third & 15) | (first >> 6 << 4)], dim=-1)
    mins = torch.cat([second & 63, (third >> 4) | (second >> 6 << 4)], dim=-1)
    return {"scales": scales.to(torch.int16), "mins": mins}


_FIELDS = MappingProxyType(
    {
        "d": _half("d"),
        "m": _half("m"),
        "pairs": (_write_pairs, _read_pairs),
        "bytes": (_write_bytes, _read_bytes),
        "scales": (_write_six, _read_six),
    }
)


def block_grid(fields: Fields, scheme: BlockScheme) -> tuple[Tensor, Tensor]:
    """S and M of every sub-block: two (out, blocks, subs) float32, exact but for the rounding of float32 itself."""
    d = fields.d.float()[..., None]
    step = d * (fields.scales.float() if fields.scales is not None else d.new_ones(1))
    if fields.m is None:
        return step, torch.zeros_like(step)
    m = fields.m.float()[..., None]
    return step, m * fields.mins.float() if fields.mins is not None else -m


def dequantise_blocks(fields: Fields, scheme: BlockScheme) -> Tensor:
    """W' (out, in) float32, bit for bit what gguf's own dequantisation gives."""
    step, low = block_grid(fields, scheme)
    level: Tensor = fields.codes.to(torch.int16).unflatten(1, (*step.shape[1:], scheme.width)) - scheme.zero
    return level.float().mul_(step[..., None]).sub_(low[..., None]).flatten(1)
