"""Plain torch, for every scheme, shape, dtype and device: dequantise some outputs, multiply, go on to the next.

It is exact and slow (each call unpacks the weight: 3 to 8 ns a weight on one CPU core) and is what others are tested
against. Weights stay packed in memory; a call needs a few times CHUNK_WEIGHTS * 4 bytes more.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn.functional import linear

from auto_round.inference.base import ROW_MULTIPLE, Reason, Stored
from auto_round.runtime.device import fast_dtype
from auto_round.spec.scheme import Scheme

CHUNK_WEIGHTS = {"cpu": 1 << 20}  # dequantised at once; more than this leaves the CPU's caches
CHUNK_WEIGHTS_ACCELERATOR = 1 << 24


class TorchReference:
    """The reference backend."""

    name = "torch_reference"
    repacks = False
    rank = 0
    spellings: tuple[str, ...] = ("torch", "torch_zp", "torch_awq", "awq_torch")

    def supports(
        self, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
    ) -> Reason | None:
        """Everything is supported."""
        return None

    def prepare(self, stored: Stored, dtype: torch.dtype) -> Stored:
        """Return `stored`: it is unpacked in each call."""
        return stored

    def linear(self, x: Tensor, prepared: Stored, bias: Tensor | None) -> Tensor:
        """Multiply with the weight that a dense layer would hold: exact in float32, then rounded to the dtype of x."""
        dtype = _multiply_dtype(x)
        inputs = x.to(dtype)
        offsets = None if bias is None else bias.to(x.dtype).to(dtype)
        step = _chunk_rows(prepared.in_features, x.device)
        parts = []
        for begin in range(0, prepared.out_features, step):
            end = min(begin + step, prepared.out_features)
            weight = prepared.rows(begin, end).dequantize(x.dtype).to(dtype)  # (end - begin, in)
            parts.append(linear(inputs, weight, None if offsets is None else offsets[begin:end]))
        return torch.cat(parts, dim=-1).to(x.dtype)


def _chunk_rows(in_features: int, device: torch.device) -> int:
    weights = CHUNK_WEIGHTS.get(device.type, CHUNK_WEIGHTS_ACCELERATOR)
    return max(weights // in_features // ROW_MULTIPLE, 1) * ROW_MULTIPLE


def _multiply_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the matrix product: that of x, or float32 where a CPU multiplies halves 10 to 100 times slower."""
    if x.device.type != "cpu" or x.dtype not in (torch.bfloat16, torch.float16):
        return x.dtype
    return x.dtype if x.dtype == _fast_cpu_dtype() else torch.float32


@functools.cache
def _fast_cpu_dtype() -> torch.dtype:
    return fast_dtype(torch.device("cpu"))


BACKEND = TorchReference()
