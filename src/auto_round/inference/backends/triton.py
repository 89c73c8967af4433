"""Triton kernels for CUDA and XPU, for every scheme; see kernels/triton_linear.py. Not yet run on a real device."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from auto_round.inference.base import Reason, Stored
from auto_round.spec.scheme import Scheme

if TYPE_CHECKING:
    from auto_round.inference.kernels.triton_linear import Words

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Triton:
    """The backend of choice on accelerators."""

    name = "triton"
    repacks = True
    rank = 10
    spellings: tuple[str, ...] = ("tritonv2", "tritonv2_zp", "triton_zp", "cuda", "xpu")

    def supports(
        self, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
    ) -> Reason | None:
        """It runs on CUDA and XPU devices with the package triton, which torch for them brings along."""
        if device.type not in ("cuda", "xpu"):
            return Reason(
                f"it runs on CUDA and XPU devices, not on {device.type}",
                "use native, or load with device_map='cuda' or 'xpu'",
            )
        if dtype not in DTYPES:
            return Reason(f"it does not take {dtype} inputs", "load in bfloat16, float16 or float32")
        old = device.type == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0)
        if old and dtype is torch.bfloat16:
            return Reason("it needs a device of compute capability 8.0 for bfloat16", "load in float16")
        if find_spec("triton") is None:
            return Reason("the package triton is not installed", "install it", "pip install triton")
        return None

    def prepare(self, stored: Stored, dtype: torch.dtype) -> Words:
        """Put the codes in words along the inputs; they stay packed."""
        from auto_round.inference.kernels.triton_linear import Words

        return Words.of(stored)

    def linear(self, x: Tensor, prepared: Words, bias: Tensor | None) -> Tensor:
        """Multiply; inputs of another dtype, with the dequantised weight."""
        from auto_round.inference.kernels.triton_linear import triton_linear

        if x.dtype not in DTYPES:
            weight = prepared.qtensor().dequantize(x.dtype)
            return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
        y = triton_linear(x, prepared)
        return y if bias is None else y + bias.to(x.dtype)


BACKEND = Triton()
