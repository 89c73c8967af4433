"""Products with packed weights in Triton, for CUDA and XPU: 2, 3, 4 and 8 bits, any group size, both symmetries.

Two kernels over the same words: one program per token and 32 outputs where tokens are few, and a tiled matrix product
where they are many. Codes are dequantised in float32, then rounded to the dtype of the inputs, as a dense layer of that
dtype holds them. This module needs triton; only the backend imports it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from auto_round.inference.base import Stored
from auto_round.numerics.bitpack import pack, unpack
from auto_round.qtensor import QTensor
from auto_round.spec.scheme import Scheme

FEW_TOKENS = 4


@dataclass(frozen=True)
class Words:
    """One packed layer.

    words: (ceil(in * bits / 32), out) int32, each column a bit stream over the inputs. scales: (groups, out) float16.
    zeros: (groups, out) uint8, or None if symmetric.
    """

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    scheme: Scheme
    in_features: int

    @classmethod
    def of(cls, stored: Stored) -> Words:
        """Pack a loaded layer."""
        tensor = stored.qtensor()
        zeros = None if tensor.zeros is None else tensor.zeros.t().contiguous()
        words = pack(tensor.codes, tensor.scheme.bits).t().contiguous()
        return cls(words, tensor.scales.t().contiguous(), zeros, tensor.scheme, tensor.in_features)

    def qtensor(self) -> QTensor:
        """Return the codes, bit-identical to those that were packed."""
        codes = unpack(self.words.t(), self.scheme.bits, self.in_features)
        zeros = None if self.zeros is None else self.zeros.t().contiguous()
        return QTensor(codes, self.scales.t().contiguous(), zeros, self.scheme)


@triton.jit  # type: ignore[untyped-decorator]
def _weights(words, scales, zeros, k, n, inputs, outputs, width, bits: tl.constexpr, sym: tl.constexpr):  # type: ignore[no-untyped-def]
    """Inputs k (a,) and outputs n (b,) -> float32 weights (a, b), zero outside."""
    inside = (k < inputs)[:, None] & (n < outputs)[None, :]
    row = k * bits // 32
    shift = (k * bits % 32)[:, None]
    at = row[:, None] * outputs + n[None, :]
    code = tl.load(words + at, mask=inside, other=0).to(tl.uint32, bitcast=True) >> shift
    if 32 % bits != 0:  # a code may lie across two words
        across = shift + bits > 32
        rest = tl.load(words + at + outputs, mask=inside & across, other=0).to(tl.uint32, bitcast=True)
        code = code | (rest << tl.where(across, 32 - shift, 0))
    value = (code & ((1 << bits) - 1)).to(tl.float32)
    group = (k // width)[:, None] * outputs + n[None, :]
    if sym:  # noqa: SIM108  # a constant for Triton: the other branch is not compiled
        value = value - (1 << (bits - 1))
    else:
        value = value - tl.load(zeros + group, mask=inside, other=0).to(tl.float32)
    return value * tl.load(scales + group, mask=inside, other=0).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _few(  # type: ignore[no-untyped-def]
    x,
    words,
    scales,
    zeros,
    y,
    inputs,
    outputs,
    width,
    bits: tl.constexpr,
    sym: tl.constexpr,
    bk: tl.constexpr,
    bn: tl.constexpr,
):
    """Program (i, m): outputs i * bn and up of token m."""
    n = tl.program_id(0) * bn + tl.arange(0, bn)
    token = tl.program_id(1)
    total = tl.zeros((bn,), tl.float32)
    for begin in range(0, inputs, bk):
        k = begin + tl.arange(0, bk)
        values = tl.load(x + token * inputs + k, mask=k < inputs, other=0)
        weight = _weights(words, scales, zeros, k, n, inputs, outputs, width, bits, sym).to(values.dtype)
        total += tl.sum(values.to(tl.float32)[:, None] * weight.to(tl.float32), axis=0)
    tl.store(y + token * outputs + n, total.to(y.dtype.element_ty), mask=n < outputs)


@triton.jit  # type: ignore[untyped-decorator]
def _many(  # type: ignore[no-untyped-def]
    x, words, scales, zeros, y, tokens, inputs, outputs, width,
    bits: tl.constexpr, sym: tl.constexpr, bm: tl.constexpr, bk: tl.constexpr, bn: tl.constexpr,
):  # fmt: skip
    """Program (i, j): tokens j * bm and up, outputs i * bn and up."""
    n = tl.program_id(0) * bn + tl.arange(0, bn)
    m = tl.program_id(1).to(tl.int64) * bm + tl.arange(0, bm)  # x and y may have more than 2^31 elements
    total = tl.zeros((bm, bn), tl.float32)
    for begin in range(0, inputs, bk):
        k = begin + tl.arange(0, bk)
        inside = (m < tokens)[:, None] & (k < inputs)[None, :]
        values = tl.load(x + m[:, None] * inputs + k[None, :], mask=inside, other=0)
        weight = _weights(words, scales, zeros, k, n, inputs, outputs, width, bits, sym).to(values.dtype)
        total = tl.dot(values, weight, total, input_precision="ieee")
    inside = (m < tokens)[:, None] & (n < outputs)[None, :]
    tl.store(y + m[:, None] * outputs + n[None, :], total.to(y.dtype.element_ty), mask=inside)


def triton_linear(x: Tensor, prepared: Words) -> Tensor:
    """x (..., in) float16, bfloat16 or float32 -> x @ W^T (..., out)."""
    scheme, outputs = prepared.scheme, prepared.words.shape[1]
    rows = x.reshape(-1, prepared.in_features).contiguous()
    y = rows.new_empty(rows.shape[0], outputs)
    zeros = prepared.scales if prepared.zeros is None else prepared.zeros  # not read when symmetric
    width = scheme.group_width(prepared.in_features)
    tensors: tuple[Any, ...] = (rows, prepared.words, prepared.scales, zeros, y)
    numbers = (prepared.in_features, outputs, width, scheme.bits, scheme.sym)
    with launching_on(x.device):
        if rows.shape[0] <= FEW_TOKENS:
            _few[(triton.cdiv(outputs, 32), rows.shape[0])](*tensors, *numbers, bk=128, bn=32)
        else:
            grid = (triton.cdiv(outputs, 64), triton.cdiv(rows.shape[0], 32))
            _many[grid](*tensors, rows.shape[0], *numbers, bm=32, bk=64, bn=64)
    return y.reshape(*x.shape[:-1], outputs)


def launching_on(device: torch.device) -> AbstractContextManager[Any]:
    """Around a launch, which goes to the current device wherever its tensors are.

    Nothing in the interpreter, which runs on the CPU, and while torch.compile records, which sees to it itself.
    """
    if device.type == "cpu" or torch.compiler.is_compiling():
        return nullcontext()
    found: AbstractContextManager[Any] = torch.get_device_module(device).device(device)
    return found
