"""Codes in the order in which the native kernel reads them, drawn at the top of ``native.c``; the same on every CPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from auto_round.errors import FormatError
from auto_round.inference.base import Stored
from auto_round.qtensor import QTensor
from auto_round.spec.scheme import Scheme

TILE = 32  # outputs
QUAD = 4  # inputs in one lane
QUADS_IN_UNIT = {2: 4, 3: 8, 4: 2, 8: 1}
ROWS_AT_ONCE = 4096  # decoded at once, so that no whole layer of unpacked codes is in memory


@dataclass(frozen=True)
class Tiles:
    """One packed layer.

    codes: (tiles, bytes) uint8. scales: (tiles, groups, 32) float16. zeros: like scales, uint8, or None if symmetric.
    Raises FormatError for scales of another dtype.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    scheme: Scheme
    out_features: int
    in_features: int

    def __post_init__(self) -> None:
        if self.scales.dtype != torch.float16:  # the kernel reads their bits
            raise FormatError(f"scales have dtype {self.scales.dtype}, expected float16")

    @classmethod
    def of(cls, tensor: QTensor) -> Tiles:
        """Pack `tensor`; outputs are padded to 32, inputs of each group to 4, 8, 16 or 32 (8, 4, 2, 3 bits)."""
        width = tensor.scheme.group_width(tensor.in_features)
        zeros = None if tensor.zeros is None else _tile_rows(tensor.zeros)
        return cls(
            _pack_units(_to_quads(tensor.codes, width, tensor.scheme.bits), tensor.scheme.bits),
            _tile_rows(tensor.scales),
            zeros,
            tensor.scheme,
            tensor.out_features,
            tensor.in_features,
        )

    @classmethod
    def of_stored(cls, stored: Stored) -> Tiles:
        """Pack a layer as its file holds it, ROWS_AT_ONCE outputs at a time."""
        ends = [*range(ROWS_AT_ONCE, stored.out_features, ROWS_AT_ONCE), stored.out_features]
        parts = [cls.of(stored.rows(begin, end)) for begin, end in zip([0, *ends], ends, strict=False)]
        zeros = [part.zeros for part in parts if part.zeros is not None]
        return cls(
            torch.cat([part.codes for part in parts]),
            torch.cat([part.scales for part in parts]),
            torch.cat(zeros) if zeros else None,
            stored.scheme,
            stored.out_features,
            stored.in_features,
        )

    def qtensor(self) -> QTensor:
        """Return the codes, bit-identical to those that were packed."""
        bits, width = self.scheme.bits, self.scheme.group_width(self.in_features)
        rows = _unpack_units(self.codes, bits).transpose(1, 2).reshape(self.codes.shape[0] * TILE, -1)  # (out, padded)
        padded = _padded(width, bits)
        whole = self.in_features // width
        body = rows[:, : whole * padded].reshape(-1, whole, padded)[..., :width].flatten(1)
        codes = torch.cat([body, rows[:, whole * padded :]], dim=1)[: self.out_features, : self.in_features]
        zeros = None if self.zeros is None else _untile_rows(self.zeros, self.out_features)
        return QTensor(codes.contiguous(), _untile_rows(self.scales, self.out_features), zeros, self.scheme)


def _padded(inputs: int, bits: int) -> int:
    unit = QUAD * QUADS_IN_UNIT[bits]
    return -(-inputs // unit) * unit


def _to_quads(codes: Tensor, width: int, bits: int) -> Tensor:
    """(out, in) -> (tiles, quads, 32, 4), each group padded to whole units."""
    out_features, in_features = codes.shape
    whole = in_features // width
    body = pad(codes[:, : whole * width].reshape(out_features, whole, width), (0, _padded(width, bits) - width))
    tail = codes[:, whole * width :]
    tail = pad(tail, (0, _padded(tail.shape[1], bits) - tail.shape[1]))
    rows = pad(torch.cat([body.flatten(1), tail], dim=1), (0, 0, 0, -out_features % TILE))  # (32 * tiles, padded)
    return rows.reshape(-1, TILE, rows.shape[1] // QUAD, QUAD).transpose(1, 2)


def _pack_units(quads: Tensor, bits: int) -> Tensor:
    """(tiles, quads, 32, 4) -> (tiles, bytes)."""
    tiles = quads.shape[0]
    units = quads.reshape(tiles, -1, QUADS_IN_UNIT[bits], TILE * QUAD)
    if bits != 3:
        return _overlay(units, bits).reshape(tiles, -1)
    low = _overlay((units & 3).unflatten(2, (2, 4)), 2)  # (tiles, units, 2, 128)
    return torch.cat([low, _overlay(units >> 2, 1).unsqueeze(2)], dim=2).reshape(tiles, -1)


def _unpack_units(codes: Tensor, bits: int) -> Tensor:
    """(tiles, bytes) -> (tiles, quads, 32, 4), transposable to rows."""
    vectors = codes.unflatten(1, (-1, TILE * QUAD))
    if bits != 3:
        units = _spread(vectors, bits, QUADS_IN_UNIT[bits])
    else:
        parts = vectors.unflatten(1, (-1, 3))
        low = _spread(parts[:, :, :2], 2, 4).flatten(2, 3)
        units = low | _spread(parts[:, :, 2], 1, 8) << 2
    return units.reshape(codes.shape[0], -1, TILE, QUAD)


def _overlay(values: Tensor, bits: int) -> Tensor:
    """(..., n, 128) -> (..., 128): value k in bits k * `bits` and up."""
    packed: Tensor = values[..., 0, :].clone()
    for k in range(1, values.shape[-2]):
        packed |= values[..., k, :] << k * bits
    return packed


def _spread(packed: Tensor, bits: int, count: int) -> Tensor:
    """(..., 128) -> (..., count, 128): the inverse of `_overlay`."""
    return torch.stack([packed >> k * bits & (1 << bits) - 1 for k in range(count)], dim=-2)


def _tile_rows(values: Tensor) -> Tensor:
    """(out, groups) -> (tiles, groups, 32)."""
    tiled: Tensor = pad(values, (0, 0, 0, -values.shape[0] % TILE)).unflatten(0, (-1, TILE))
    return tiled.transpose(1, 2).contiguous()


def _untile_rows(values: Tensor, out_features: int) -> Tensor:
    """(tiles, groups, 32) -> (out, groups)."""
    return values.transpose(1, 2).flatten(0, 1)[:out_features].contiguous()
