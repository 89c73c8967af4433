"""Our compiled kernel for CPUs: 2, 3, 4 and 8 bits, any group size, symmetry and shape; see kernels/native.py."""

from __future__ import annotations

import torch
from torch import Tensor

from auto_round.inference.base import Reason, Stored, tracing
from auto_round.inference.kernels.native import DTYPES, library, native_linear, operator_linear, reference_linear
from auto_round.inference.kernels.tiles import QUADS_IN_UNIT, Tiles
from auto_round.spec.scheme import Scheme


class Native:
    """The backend of choice on CPUs."""

    name = "native"
    repacks = True
    rank = 20
    spellings: tuple[str, ...] = ("cpu",)

    def supports(
        self, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
    ) -> Reason | None:
        """It runs on CPUs, for float32, bfloat16 and float16 inputs, once it was built."""
        if device.type != "cpu":
            return Reason(f"it runs on CPUs, not on {device.type}", "load with device_map='cpu'")
        if scheme.bits not in QUADS_IN_UNIT:
            return Reason(f"it has no kernel for {scheme.bits} bits", f"use {', '.join(map(str, QUADS_IN_UNIT))} bits")
        if dtype not in DTYPES:
            return Reason(f"it does not take {dtype} inputs", "load in bfloat16, float16 or float32")
        found = library()
        return found if isinstance(found, Reason) else None

    def prepare(self, stored: Stored, dtype: torch.dtype) -> Tiles:
        """Put the codes in the order in which the kernel reads them; they stay packed."""
        return Tiles.of_stored(stored)

    def linear(self, x: Tensor, prepared: Tiles, bias: Tensor | None) -> Tensor:
        """Multiply; through torch's operator, which costs some microseconds more, only where that is needed."""
        if x.dtype not in DTYPES:
            return reference_linear(x, prepared, bias)
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        recorded = torch.compiler.is_compiling() or tracing()
        return (operator_linear if recorded else native_linear)(x, prepared, bias)


BACKEND = Native()
