"""Marlin of the package gptqmodel, for CUDA: 4 and 8 bits, symmetric. Not yet run on a real device."""

from __future__ import annotations

import torch
from torch import Tensor

from auto_round.inference.base import Reason, Stored
from auto_round.inference.kernels.borrowed import Borrowed
from auto_round.inference.kernels.gptqmodel import INSTEAD, filled, layer_class, refusal
from auto_round.spec.scheme import Scheme

LAYER = ("marlin", "MarlinLinear")


class Marlin:
    """The backend of choice on CUDA where gptqmodel is installed."""

    name = "marlin"
    repacks = True
    rank = 18
    spellings: tuple[str, ...] = ("gptqmodel:marlin", "gptq_marlin", "gptqmodel", "cuda")

    def supports(
        self, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
    ) -> Reason | None:
        """What the package says (see `refusal`), which compiles its kernel when it is first asked."""
        reason = refusal(*LAYER, scheme, shape, dtype, device)
        if reason is not None:
            return reason
        from gptqmodel.utils.marlin import marlin_runtime_available, marlin_runtime_error

        if marlin_runtime_available(dtype):
            return None
        return Reason(f"gptqmodel cannot compile it: {marlin_runtime_error(dtype)}", INSTEAD)

    def prepare(self, stored: Stored, dtype: torch.dtype) -> Borrowed:
        """Let the package reorder the codes; the first products are checked."""
        module = filled(layer_class(*LAYER), stored, dtype)
        module.post_init()
        return Borrowed.of(self.name, stored, dtype, module)

    def linear(self, x: Tensor, prepared: Borrowed, bias: Tensor | None) -> Tensor:
        """See `Borrowed.linear`."""
        return prepared.linear(x, bias)


BACKEND = Marlin()
