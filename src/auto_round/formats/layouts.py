"""How the QTensor of one Linear lies in a checkpoint: the GPTQ, AWQ and compressed-tensors layouts.

With b bits, G = ceil(in / group width) groups, z the zero point and W = s * (q - z):

GPTQ    qweight int32   [ceil(in*b/32), out]   column o: the bit stream of output o's codes over the inputs
        qzeros  int32   [G, ceil(out*b/32)]    row k: the bit stream of (z - offset) over the outputs
        scales  float16 [G, out]
        g_idx   int32   [in]                   the group of each input; only in plain GPTQ files
        offset 1 is GPTQ v1 (``auto_round:auto_gptq``), offset 0 is raw (bare ``auto_round``, GPTQ v2)

AWQ     qweight int32   [in, out/8]            row i: nibble slot k of a word holds output [0,2,4,6,1,3,5,7][k]
        qzeros  int32   [G, out/8]             row k: z in the same order
        scales  float16 [G, out]

compressed-tensors, pack-quantized
        weight_packed     int32   [out, ceil(in*b/32)]   row o: the bit stream of output o's codes over the inputs
        weight_scale      float16 [out, G]
        weight_shape      int64   [2]                    (out, in)
        weight_zero_point int32   [ceil(out*b/32), G]    column k: the stream of z over the outputs; asymmetric only
        (codes and zero points are signed there and stored with 2^(b-1) added, which is q and z again)

A zero point of 0 does not fit GPTQ v1. There W = s * q is written as (-s) * ((M - q) - M), M the largest code: the same
weights, with the zero point M and a negative scale, and turned back when it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from auto_round.errors import FormatError
from auto_round.numerics.bitpack import pack, packed_length, unpack
from auto_round.numerics.groups import expand_groups
from auto_round.qtensor import QTensor, plain_g_idx
from auto_round.spec.scheme import Scheme

TensorSpec = tuple[torch.dtype, tuple[int, ...]]
Shapes = Mapping[str, tuple[int, ...]]
Read = Callable[[str], Tensor]

AWQ_SLOT_TO_OUTPUT = (0, 2, 4, 6, 1, 3, 5, 7)
AWQ_OUTPUT_TO_SLOT = (0, 4, 1, 5, 2, 6, 3, 7)


class Layout(Protocol):
    """Encoder and decoder of one layer; `specs` tells dtypes and shapes without any data."""

    @property
    def key(self) -> str:
        """Suffix of the tensor that holds the codes."""
        ...

    def refuse(self, scheme: Scheme, out_features: int, in_features: int) -> str | None:
        """Say why the layout cannot hold such a layer, or None."""
        ...

    def specs(self, scheme: Scheme, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        """Return {tensor suffix: (dtype, shape)}."""
        ...

    def shape(self, shapes: Shapes, bits: int, read: Read) -> tuple[int, int]:
        """Return (out, in) from the shapes of the stored tensors by suffix; `read` gives one of them."""
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
    """GPTQ words; `zero_offset` is what the file subtracts from zero points (1 in v1, 0 in v2 and raw).

    indexed: the file has a g_idx, so that the inputs of a group need not be neighbours.
    """

    zero_offset: int
    indexed: bool = False
    key = "qweight"

    def refuse(self, scheme: Scheme, out_features: int, in_features: int) -> str | None:
        """Both dimensions must be multiples of 32."""
        return _refuse_odd(out_features, in_features)

    def specs(self, scheme: Scheme, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        """Dtypes and shapes as drawn at the top of this file."""
        groups = scheme.group_count(in_features)
        found = {
            "qweight": (torch.int32, (packed_length(in_features, scheme.bits), out_features)),
            "qzeros": (torch.int32, (groups, packed_length(out_features, scheme.bits))),
            "scales": (torch.float16, (groups, out_features)),
        }
        return found | ({"g_idx": (torch.int32, (in_features,))} if self.indexed else {})

    def shape(self, shapes: Shapes, bits: int, read: Read) -> tuple[int, int]:
        """(out, in): g_idx counts the inputs where it is there; the words alone tell them only up to their padding."""
        rows, out_features = shapes["qweight"]
        return out_features, shapes["g_idx"][0] if "g_idx" in shapes else rows * 32 // bits

    def encode(self, tensor: QTensor) -> dict[str, Tensor]:
        """Pack codes along the inputs and zero points along the outputs; zero points of 0 are mirrored in v1."""
        if tensor.g_idx is not None and not self.indexed:
            raise FormatError("inputs of a group are not neighbours (act-order), and this layout has no g_idx")
        bits = tensor.scheme.bits
        codes, scales, zeros = _mirrored(tensor) if self.zero_offset else (tensor.codes, tensor.scales, None)
        zeros = tensor.zero_points() if zeros is None else zeros
        found = {
            "qweight": pack(codes, bits).t().contiguous(),
            "qzeros": pack(zeros.t().to(torch.int16) - self.zero_offset, bits),
            "scales": _half(scales).t().contiguous(),
        }
        if self.indexed:
            g_idx = plain_g_idx(tensor.scheme, tensor.in_features) if tensor.g_idx is None else tensor.g_idx
            found["g_idx"] = g_idx.to(codes.device)
        return found

    def decode(self, tensors: Mapping[str, Tensor], scheme: Scheme, in_features: int) -> QTensor:
        """Unpack; the symmetric scheme's zero points are checked to be the constant they must be.

        tensors may hold a g_idx also when the layout does not write one.
        """
        scales = tensors["scales"].t().contiguous()
        words = _add_to_fields(tensors["qzeros"], scheme.bits) if self.zero_offset else tensors["qzeros"]
        zeros = unpack(words, scheme.bits, scales.shape[0])
        if self.zero_offset and 32 % scheme.bits:
            zeros = (zeros + self.zero_offset) & scheme.max_code
        codes = unpack(tensors["qweight"].t(), scheme.bits, in_features)
        g_idx = _g_idx(tensors.get("g_idx"), scheme, in_features)
        tensor = QTensor(codes, scales, _zeros_of(scheme, zeros.t()), scheme, g_idx)
        return _unmirrored(tensor) if self.zero_offset else tensor


def _add_to_fields(words: Tensor, bits: int) -> Tensor:
    """Undo the subtraction of 1 from every field of a word, as a whole word.

    gptqmodel writes v1 that way, so that a zero point of 0 borrows from the next field, and reads it that way.
    """
    return words + sum(1 << shift for shift in range(0, 31, bits)) if 32 % bits == 0 else words


def _g_idx(stored: Tensor | None, scheme: Scheme, in_features: int) -> Tensor | None:
    """The file's g_idx, None when it is only i // group width; negative entries count from the last group."""
    if stored is None:
        return None
    groups = scheme.group_count(in_features)
    g_idx = torch.where(stored < 0, stored + groups, stored).to(torch.int32)
    if bool((g_idx < 0).any()) or bool((g_idx >= groups).any()):
        raise FormatError(f"g_idx names groups outside 0 .. {groups - 1}")
    return None if torch.equal(g_idx, plain_g_idx(scheme, in_features).to(g_idx.device)) else g_idx


def _mirrored(tensor: QTensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """(codes, scales, zeros) without a zero point of 0; see the top of this file."""
    if tensor.zeros is None:
        return tensor.codes, tensor.scales, None
    top = tensor.scheme.max_code
    if bool((((tensor.zeros == top) | (tensor.zeros == 0)) & (tensor.scales < 0)).any()):
        raise FormatError(
            f"GPTQ v1 cannot hold a negative scale with a zero point of 0 or {top}; use gptq_v2 or auto_round"
        )
    return _flip(tensor, tensor.zeros == 0, top)


def _unmirrored(tensor: QTensor) -> QTensor:
    if tensor.zeros is None:
        return tensor
    flip = (tensor.zeros == tensor.scheme.max_code) & (tensor.scales < 0)
    codes, scales, zeros = _flip(tensor, flip, 0)
    return QTensor(codes, scales, zeros, tensor.scheme, tensor.g_idx)


def _flip(tensor: QTensor, which: Tensor, zero: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Mirror the codes of the groups `which` (out, groups), whose zero point becomes `zero`."""
    if not bool(which.any()):
        return tensor.codes, tensor.scales, tensor.zeros
    width = tensor.scheme.group_width(tensor.in_features)
    wide = (
        which[:, tensor.g_idx.long()] if tensor.g_idx is not None else expand_groups(which, width, tensor.in_features)
    )
    codes = torch.where(wide, tensor.scheme.max_code - tensor.codes, tensor.codes)
    scales = torch.where(which, -tensor.scales, tensor.scales)
    return codes, scales, torch.where(which, zero, tensor.zero_points()).to(torch.uint8)


@dataclass(frozen=True)
class AwqLayout:
    """AWQ gemm words, 4 bits only; zero points are stored as they are."""

    key = "qweight"

    def refuse(self, scheme: Scheme, out_features: int, in_features: int) -> str | None:
        """4 bits, dimensions that are multiples of 32, and groups that divide the inputs."""
        if scheme.bits != 4:
            return f"AWQ holds 4 bits only, not {scheme.bits}"
        if not scheme.divides(in_features):
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

    def shape(self, shapes: Shapes, bits: int, read: Read) -> tuple[int, int]:
        """(out, in) of the words."""
        in_features, words = shapes["qweight"]
        return words * 8, in_features

    def encode(self, tensor: QTensor) -> dict[str, Tensor]:
        """Pack codes and zero points along the outputs in AWQ's interleaved order."""
        if tensor.g_idx is not None:
            raise FormatError("inputs of a group are not neighbours (act-order), and AWQ has no g_idx")
        return {
            "qweight": pack(_interleave(tensor.codes.t(), AWQ_SLOT_TO_OUTPUT), 4),
            "qzeros": pack(_interleave(tensor.zero_points().t(), AWQ_SLOT_TO_OUTPUT), 4),
            "scales": _half(tensor.scales).t().contiguous(),
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


@dataclass(frozen=True)
class CompressedLayout:
    """The pack-quantized tensors of compressed-tensors."""

    key = "weight_packed"

    def refuse(self, scheme: Scheme, out_features: int, in_features: int) -> str | None:
        """Groups must divide the inputs; the library checks that when it decompresses."""
        if not scheme.divides(in_features):
            return (
                "compressed-tensors needs group_size to divide the inputs; "
                f"{scheme.group_size} does not divide {in_features}"
            )
        return None

    def specs(self, scheme: Scheme, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        """Dtypes and shapes as drawn at the top of this file."""
        groups = scheme.group_count(in_features)
        found: dict[str, TensorSpec] = {
            "weight_packed": (torch.int32, (out_features, packed_length(in_features, scheme.bits))),
            "weight_scale": (torch.float16, (out_features, groups)),
            "weight_shape": (torch.int64, (2,)),
        }
        if not scheme.sym:
            found["weight_zero_point"] = (torch.int32, (packed_length(out_features, scheme.bits), groups))
        return found

    def shape(self, shapes: Shapes, bits: int, read: Read) -> tuple[int, int]:
        """(out, in) as weight_shape holds them: the words are padded."""
        out_features, in_features = read("weight_shape").tolist()
        return out_features, in_features

    def encode(self, tensor: QTensor) -> dict[str, Tensor]:
        """Pack codes along the inputs and zero points along the outputs."""
        if tensor.g_idx is not None:
            raise FormatError("inputs of a group are not neighbours (act-order); compressed-tensors no longer has that")
        bits = tensor.scheme.bits
        found = {
            "weight_packed": pack(tensor.codes, bits),
            "weight_scale": _half(tensor.scales).contiguous(),
            "weight_shape": torch.tensor([tensor.out_features, tensor.in_features]),
        }
        if tensor.zeros is not None:
            found["weight_zero_point"] = pack(tensor.zeros.t(), bits).t().contiguous()
        return found

    def decode(self, tensors: Mapping[str, Tensor], scheme: Scheme, in_features: int) -> QTensor:
        """Inverse of `encode`."""
        scales = tensors["weight_scale"].contiguous()
        out_features = scales.shape[0]
        codes = unpack(tensors["weight_packed"], scheme.bits, in_features)
        if scheme.sym:
            return QTensor(codes, scales, None, scheme)
        zeros = unpack(tensors["weight_zero_point"].t(), scheme.bits, out_features).t().contiguous()
        return QTensor(codes, scales, zeros, scheme)


def _half(scales: Tensor) -> Tensor:
    """The scales in the files' float16; those of others may have been wider."""
    half = scales.to(torch.float16)
    if half.dtype != scales.dtype and not torch.equal(half.to(scales.dtype), scales):
        raise FormatError(f"its {scales.dtype} scales do not fit float16 exactly".replace("torch.", ""))
    return half


def _zeros_of(scheme: Scheme, zeros: Tensor) -> Tensor | None:
    if not scheme.sym:
        return zeros.contiguous()
    if not bool((zeros == scheme.mid_code).all()):
        raise FormatError(f"a symmetric layer's zero points are not all {scheme.mid_code}; the config says sym=true")
    return None


GPTQ_V1 = GptqLayout(zero_offset=1)
GPTQ_RAW = GptqLayout(zero_offset=0)
GPTQ_V1_INDEXED = GptqLayout(zero_offset=1, indexed=True)
GPTQ_RAW_INDEXED = GptqLayout(zero_offset=0, indexed=True)
AWQ = AwqLayout()
COMPRESSED = CompressedLayout()
