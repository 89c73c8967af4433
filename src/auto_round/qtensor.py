"""The hub type: what the tuner makes, every writer encodes, every reader returns and every backend prepares from."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from auto_round.errors import FormatError
from auto_round.numerics.groups import expand_groups
from auto_round.numerics.kpack import Fields, dequantise_blocks, pack_blocks, unpack_blocks
from auto_round.spec.blocks import BlockScheme, block_of, integer_of
from auto_round.spec.scheme import Scheme


@dataclass(frozen=True)
class QTensor:
    """A quantised weight. W[o, i] = scales[o, k] * (codes[o, i] - zeros[o, k]) with k = i // group width.

    codes: (out, in) uint8, values 0 .. 2^bits-1.
    scales: (out, groups) float16 (float32 in models of others that need it); may be negative in the symmetric scheme.
    zeros: (out, groups) uint8, values 0 .. 2^bits-1; None in the symmetric scheme, where it is 2^(bits-1) throughout.
    g_idx: (in,) int32, the group k of each input where inputs of a group are not neighbours (act-order GPTQ, see
    `in_order`); None where k = i // group width.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    scheme: Scheme
    g_idx: Tensor | None = None

    def __post_init__(self) -> None:
        out_features, in_features = self.codes.shape
        grid = (out_features, self.scheme.group_count(in_features))
        if self.codes.dtype != torch.uint8:
            raise FormatError(f"codes have dtype {self.codes.dtype}, expected uint8")
        if tuple(self.scales.shape) != grid:
            raise FormatError(f"scales have shape {tuple(self.scales.shape)}, expected {grid}")
        if (self.zeros is None) != self.scheme.sym:
            raise FormatError(f"zero points are {'missing' if self.zeros is None else 'given'} with {self.scheme}")
        if self.zeros is not None and tuple(self.zeros.shape) != grid:
            raise FormatError(f"zero points have shape {tuple(self.zeros.shape)}, expected {grid}")
        if self.g_idx is not None and tuple(self.g_idx.shape) != (in_features,):
            raise FormatError(f"g_idx has shape {tuple(self.g_idx.shape)}, expected {(in_features,)}")

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        """Columns of the weight, without padding."""
        return self.codes.shape[1]

    def zero_points(self) -> Tensor:
        """(out, groups) uint8 zero points, also for the symmetric scheme."""
        if self.zeros is not None:
            return self.zeros
        return torch.full(self.scales.shape, self.scheme.mid_code, dtype=torch.uint8, device=self.scales.device)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight (out, in): exact in float32, then rounded to `dtype`."""
        offsets = self._spread(self.zero_points())
        scales = self._spread(self.scales.float())
        return ((self.codes.to(torch.int16) - offsets).float() * scales).to(dtype)

    def to(self, device: torch.device) -> QTensor:
        """The same tensor on `device`."""
        zeros, g_idx = (None if part is None else part.to(device) for part in (self.zeros, self.g_idx))
        return dataclasses.replace(
            self, codes=self.codes.to(device), scales=self.scales.to(device), zeros=zeros, g_idx=g_idx
        )

    def in_order(self) -> tuple[QTensor, Tensor]:
        """Bring the inputs of a group together: return (a tensor without g_idx, order (in,) int64) of equal weights.

        Column j of the new tensor is column order[j] of this one, so x @ W^T = x[..., order] @ new^T. Raises
        FormatError when the groups do not have the sizes that the scheme says.
        """
        if self.g_idx is None:
            return self, torch.arange(self.in_features, device=self.codes.device)
        order = torch.argsort(self.g_idx, stable=True)
        if not torch.equal(self.g_idx[order], plain_g_idx(self.scheme, self.in_features).to(order.device)):
            raise FormatError(f"g_idx does not have {self.scheme.group_width(self.in_features)} inputs in each group")
        return dataclasses.replace(self, codes=self.codes[:, order], g_idx=None), order

    def out_of_order(self, order: Tensor) -> QTensor:
        """Inverse of `in_order`: put the columns back; order (in,) int64 as it returned it."""
        codes, g_idx = torch.empty_like(self.codes), plain_g_idx(self.scheme, self.in_features).to(order.device)
        codes[:, order] = self.codes
        scattered = torch.empty_like(g_idx)
        scattered[order] = g_idx
        return dataclasses.replace(self, codes=codes, g_idx=scattered)

    def _spread(self, values: Tensor) -> Tensor:
        """(out, groups) -> (out, in): each input gets its group's value."""
        if self.g_idx is not None:
            return values[:, self.g_idx.long()]
        return expand_groups(values, self.scheme.group_width(self.in_features), self.in_features)

    def same(self, other: QTensor) -> bool:
        """True when codes, scales, zero points and groups are bit-identical."""
        return (
            self.scheme == other.scheme
            and torch.equal(self.codes, other.codes)
            and torch.equal(self.scales, other.scales)
            and torch.equal(self.zero_points(), other.zero_points())
            and (self.g_idx is None) == (other.g_idx is None)
            and (self.g_idx is None or other.g_idx is None or torch.equal(self.g_idx, other.g_idx))
        )


def plain_g_idx(scheme: Scheme, in_features: int) -> Tensor:
    """(in,) int32: the group of each input where groups are runs of neighbours, i // group width."""
    return torch.arange(in_features, dtype=torch.int32) // scheme.group_width(in_features)


@dataclass(frozen=True)
class BlockTensor:
    """A weight in GGUF blocks, as the bytes that go to the file: (out, in / block size * block bytes) uint8."""

    data: Tensor
    scheme: BlockScheme

    def __post_init__(self) -> None:
        if self.data.dtype != torch.uint8 or self.data.dim() != 2 or self.data.shape[1] % self.scheme.block_bytes:
            raise FormatError(
                f"blocks of {self.scheme.name} are rows of {self.scheme.block_bytes} bytes each, "
                f"not {list(self.data.shape)} {self.data.dtype}"
            )

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.data.shape[0]

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return self.data.shape[1] // self.scheme.block_bytes * self.scheme.size

    def fields(self) -> Fields:
        """Codes, scales and minimums."""
        return unpack_blocks(self.data, self.scheme)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight (out, in): as llama.cpp computes it in float32, then rounded to `dtype`."""
        return dequantise_blocks(self.fields(), self.scheme).to(dtype)

    def to(self, device: torch.device) -> BlockTensor:
        """The same tensor on `device`."""
        return dataclasses.replace(self, data=self.data.to(device))

    def same(self, other: BlockTensor) -> bool:
        """True when type and bytes are identical."""
        return self.scheme == other.scheme and torch.equal(self.data, other.data)


QuantTensor = QTensor | BlockTensor


def to_blocks(tensor: QuantTensor) -> BlockTensor:
    """The same codes and scales in GGUF blocks; raise FormatError when no block type has the tensor's grid."""
    if isinstance(tensor, BlockTensor):
        return tensor
    target = block_of(tensor.scheme, tensor.in_features)
    if target is None or tensor.g_idx is not None or tensor.scales.dtype != torch.float16:
        raise FormatError(
            f"no GGUF type has the grid of {tensor.scheme.name} with {tensor.in_features} inputs; only symmetric "
            "schemes of 4 and 8 bits in groups of 32 neighbours are exact (q4_0, q8_0)"
        )
    fields = Fields(tensor.codes, tensor.scales, None, None, None)
    return BlockTensor(pack_blocks(fields, target), target)


def from_blocks(tensor: QuantTensor) -> QTensor:
    """The inverse of `to_blocks`, for q4_0 and q8_0; raise FormatError for types whose grid no scheme has."""
    if isinstance(tensor, QTensor):
        return tensor
    scheme = integer_of(tensor.scheme)
    if scheme is None:
        raise FormatError(f"GGUF type {tensor.scheme.name} has a grid that no integer scheme has; only floats hold it")
    fields = tensor.fields()
    return QTensor(fields.codes, fields.d, None, scheme)


def joined(parts: Sequence[QuantTensor]) -> QuantTensor:
    """Rows of one weight, each part of the same scheme, put together on the host."""
    if isinstance(parts[0], BlockTensor):
        return BlockTensor(torch.cat([p.data for p in parts if isinstance(p, BlockTensor)]).cpu(), parts[0].scheme)
    whole = [p for p in parts if isinstance(p, QTensor)]
    zeros = None if parts[0].scheme.sym else torch.cat([p.zeros for p in whole if p.zeros is not None]).cpu()
    codes, scales = torch.cat([p.codes for p in whole]).cpu(), torch.cat([p.scales for p in whole]).cpu()
    return QTensor(codes, scales, zeros, parts[0].scheme)
