"""How the QTensor of one Linear lies in a checkpoint: the GPTQ and the AWQ tensor layouts.

With b bits, G = ceil(in / group width) groups, z the zero point and W = s * (q - z):

GPTQ    qweight int32   [ceil(in*b/32), out]   column o: the bit stream of output o's codes over the inputs
        qzeros  int32   [G, ceil(out*b/32)]    row k: the bit stream of (z - offset) over the outputs
        scales  float16 [G, out]
        offset 1 is GPTQ v1 (``auto_round:auto_gptq``), offset 0 is raw (bare ``auto_round``, GPTQ v2)

AWQ     qweight int32   [in, out/8]            row i: nibble slot k of a word holds output [0,2,4,6,1,3,5,7][k]
        qzeros  int32   [G, out/8]             row k: z in the same order
        scales  float16 [G, out]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from auto_round.errors import FormatError
from auto_round.numerics.bitpack import pack, packed_length, unpack
from auto_round.qtensor import QTensor
from auto_round.spec.scheme import Scheme

TensorSpec = tuple[torch.dtype, tuple[int, ...]]

AWQ_SLOT_TO_OUTPUT = (0, 2, 4, 6, 1, 3, 5, 7)
AWQ_OUTPUT_TO_SLOT = (0, 4, 1, 5, 2, 6, 3, 7)


class Layout(Protocol):
    """Encoder and decoder of one layer; `specs` tells dtypes and shapes without any data."""

    def refuse(self, scheme: Scheme, out_features: int, in_features: int) -> str | None:
        """Say why the layout cannot hold such a layer, or None."""
        ...

    def specs(self, scheme: Scheme, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        """Return {tensor suffix: (dtype, shape)}."""
        ...

    def encode(self, tensor: QTensor) -> dict[str, Tensor]:
        """Return {tensor suffix: tensor} as they go to disk; raise FormatError if the layout cannot hold them."""
        ...

    def decode(self, tensors: Mapping[str, Tensor], scheme: Scheme, in_features: int) -> QTensor:
        """Rebuild the QTensor that `encode` was given."""
        ...


def _refuse_odd(out_features: int, in_features: int) -> str | None:
    if out_features % 32 or in_features % 32:
        return f"shape [{out_features}, {in_features}] is not a multiple of 32 in both dimensions, as packed words need"
    return None


@dataclass(frozen=True)
class GptqLayout:
    """GPTQ words; `zero_offset` is what the file subtracts from zero points (1 in v1, 0 in v2 and raw)."""

    zero_offset: int

    def refuse(self, scheme: Scheme, out_features: int, in_features: int) -> str | None:
        """Both dimensions must be multiples of 32."""
        return _refuse_odd(out_features, in_features)

    def specs(self, scheme: Scheme, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        """Dtypes and shapes as drawn at the top of this file."""
        groups = scheme.group_count(in_features)
        return {
            "qweight": (torch.int32, (packed_length(in_features, scheme.bits), out_features)),
            "qzeros": (torch.int32, (groups, packed_length(out_features, scheme.bits))),
            "scales": (torch.float16, (groups, out_features)),
        }

    def encode(self, tensor: QTensor) -> dict[str, Tensor]:
        """Pack codes along the inputs and zero points along the outputs; a zero point below the offset is refused."""
        bits = tensor.scheme.bits
        zeros = tensor.zero_points().to(torch.int16) - self.zero_offset
        if bool((zeros < 0).any()):
            raise FormatError("GPTQ v1 cannot hold a zero point of 0; use the raw or AWQ packing (asymmetric schemes)")
        return {
            "qweight": pack(tensor.codes, bits).t().contiguous(),
            "qzeros": pack(zeros.t(), bits),
            "scales": tensor.scales.to(torch.float16).t().contiguous(),
        }

    def decode(self, tensors: Mapping[str, Tensor], scheme: Scheme, in_features: int) -> QTensor:
        """Unpack; the symmetric scheme's zero points are checked to be the constant they must be."""
        scales = tensors["scales"].t().contiguous()
        zeros = unpack(tensors["qzeros"], scheme.bits, scales.shape[0]).t() + self.zero_offset
        codes = unpack(tensors["qweight"].t(), scheme.bits, in_features)
        return QTensor(codes, scales, _zeros_of(scheme, zeros), scheme)


@dataclass(frozen=True)
class AwqLayout:
    """AWQ gemm words, 4 bits only; zero points are stored as they are."""

    def refuse(self, scheme: Scheme, out_features: int, in_features: int) -> str | None:
        """4 bits, dimensions that are multiples of 32, and groups that divide the inputs."""
        if scheme.bits != 4:
            return f"AWQ holds 4 bits only, not {scheme.bits}"
        if in_features % scheme.group_width(in_features):
            return f"AWQ needs group_size to divide the inputs; {scheme.group_size} does not divide {in_features}"
        return _refuse_odd(out_features, in_features)

    def specs(self, scheme: Scheme, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        """Dtypes and shapes as drawn at the top of this file."""
        groups = scheme.group_count(in_features)
        return {
            "qweight": (torch.int32, (in_features, out_features // 8)),
            "qzeros": (torch.int32, (groups, out_features // 8)),
            "scales": (torch.float16, (groups, out_features)),
        }

    def encode(self, tensor: QTensor) -> dict[str, Tensor]:
        """Pack codes and zero points along the outputs in AWQ's interleaved order."""
        return {
            "qweight": pack(_interleave(tensor.codes.t(), AWQ_SLOT_TO_OUTPUT), 4),
            "qzeros": pack(_interleave(tensor.zero_points().t(), AWQ_SLOT_TO_OUTPUT), 4),
            "scales": tensor.scales.to(torch.float16).t().contiguous(),
        }

    def decode(self, tensors: Mapping[str, Tensor], scheme: Scheme, in_features: int) -> QTensor:
        """Inverse of `encode`."""
        scales = tensors["scales"].t().contiguous()
        out_features = scales.shape[0]
        codes = _interleave(unpack(tensors["qweight"], 4, out_features), AWQ_OUTPUT_TO_SLOT).t().contiguous()
        zeros = _interleave(unpack(tensors["qzeros"], 4, out_features), AWQ_OUTPUT_TO_SLOT).t()
        return QTensor(codes, scales, _zeros_of(scheme, zeros), scheme)


def _interleave(values: Tensor, order: tuple[int, ...]) -> Tensor:
    """(rows, n) -> (rows, n) with each run of 8 taken in `order`."""
    return values.reshape(values.shape[0], -1, 8)[..., list(order)].reshape(values.shape)


def _zeros_of(scheme: Scheme, zeros: Tensor) -> Tensor | None:
    if not scheme.sym:
        return zeros.contiguous()
    if not bool((zeros == scheme.mid_code).all()):
        raise FormatError(f"a symmetric layer's zero points are not all {scheme.mid_code}; the config says sym=true")
    return None


GPTQ_V1 = GptqLayout(zero_offset=1)
GPTQ_RAW = GptqLayout(zero_offset=0)
AWQ = AwqLayout()
