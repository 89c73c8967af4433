"""torch's own 4-bit kernel ("tinygemm") for CPU and CUDA, for bfloat16 inputs. On CUDA not yet run.

It computes x @ W^T with W = (code - 8) * scale + zero, one (scale, zero) in bfloat16 for each group; so scales and zero
points lose bits that the file holds: up to 0.4%.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from auto_round.inference.base import Reason, Stored
from auto_round.inference.kernels.borrowed import Borrowed
from auto_round.spec.scheme import Scheme

GROUPS = (32, 64, 128, 256)
INNER_TILES = (8, 4, 2)  # of 16 inputs, which a CUDA tile holds; the more the better
ROWS = {"cpu": 16, "cuda": 8}  # outputs that the kernel works on at once


class Int4Pack:
    """Behind our own kernels: for where they cannot be built."""

    name = "int4pack"
    repacks = True
    rank = 5
    spellings: tuple[str, ...] = ("tinygemm", "cuda")

    def supports(
        self, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
    ) -> Reason | None:
        """Four bits, bfloat16, on CPU and CUDA, where groups and tiles fit."""
        other = "use another backend"
        if device.type not in ROWS:
            return Reason(f"it runs on CPUs and CUDA devices, not on {device.type}", other)
        if scheme.bits != 4:
            return Reason(f"it has no kernel for {scheme.bits} bits", other)
        if dtype != torch.bfloat16:
            return Reason(f"it is slow or wrong for {dtype} inputs", "load in bfloat16")
        width = scheme.group_width(shape[1])
        if width not in GROUPS or shape[1] % width:
            return Reason(f"it has no groups of {width} in {shape[1]} inputs", other)
        if shape[0] % ROWS[device.type]:
            return Reason(f"{shape[0]} outputs are no multiple of {ROWS[device.type]}", other)
        return None

    def prepare(self, stored: Stored, dtype: torch.dtype) -> Borrowed:
        """Put codes, scales and zero points as torch wants them; the first products are checked."""
        tensor = stored.qtensor()
        scales = tensor.scales.float()
        zeros = torch.zeros_like(scales) if tensor.zeros is None else (8 - tensor.zeros.float()) * scales
        pairs = torch.stack([scales, zeros], -1).transpose(0, 1).contiguous().bfloat16()  # (groups, out, 2)
        width = stored.scheme.group_width(stored.in_features)
        if tensor.codes.device.type == "cpu":
            codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(tensor.codes.int(), 1)
            operator = torch.ops.aten._weight_int4pack_mm_for_cpu
        else:
            tiles = next(t for t in INNER_TILES if stored.in_features % (16 * t) == 0)
            codes = torch.ops.aten._convert_weight_to_int4pack(nibbles(tensor.codes), tiles)
            operator = torch.ops.aten._weight_int4pack_mm
        multiply = partial(_multiply, operator, codes, width, pairs)
        return Borrowed.of(self.name, stored, torch.bfloat16, multiply)

    def linear(self, x: Tensor, prepared: Borrowed, bias: Tensor | None) -> Tensor:
        """See `Borrowed.linear`."""
        return prepared.linear(x, bias)


def _multiply(operator: torch._ops.OpOverloadPacket, codes: Tensor, width: int, pairs: Tensor, x: Tensor) -> Tensor:
    y: Tensor = operator(x, codes, width, pairs)
    return y


def nibbles(codes: Tensor) -> Tensor:
    """uint8 (out, in) -> uint8 (out, in / 2), the even input in the high nibble, as the CUDA operator reads them."""
    return codes[:, ::2] << 4 | codes[:, 1::2]


BACKEND = Int4Pack()
