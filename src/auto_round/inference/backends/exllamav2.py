"""ExLlamaV2's kernel in the package gptqmodel, for CUDA: 4 bits. Not yet run on a real device."""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from auto_round.inference.base import Reason, Stored
from auto_round.inference.kernels.borrowed import Borrowed
from auto_round.inference.kernels.gptqmodel import filled, layer_class, refusal
from auto_round.spec.scheme import Scheme

LAYER = ("exllamav2", "ExllamaV2Linear")


class ExllamaV2:
    """Second to Marlin, and for asymmetric layers the first.

    For long inputs its kernel writes the float16 weight into scratch memory, which layers of a size share while any of
    them lives.
    """

    name = "exllamav2"
    repacks = True
    rank = 16
    spellings: tuple[str, ...] = ("gptqmodel:exllamav2", "gptq:exllamav2", "exllama", "gptqmodel", "cuda")

    def __init__(self) -> None:
        self._scratch: WeakValueDictionary[tuple[torch.device, int], Any] = WeakValueDictionary()

    def supports(
        self, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
    ) -> Reason | None:
        """What the package says; see `refusal`."""
        return refusal(*LAYER, scheme, shape, dtype, device)

    def prepare(self, stored: Stored, dtype: torch.dtype) -> Borrowed:
        """Let the package reorder the codes; the first products are checked."""
        from gptqmodel.utils.exllamav2 import ScratchSpace

        module = filled(layer_class(*LAYER), stored, dtype)
        key = (module.qweight.device, 1 << (module.temp_dq_size() - 1).bit_length())
        scratch = self._scratch.get(key) or ScratchSpace(key[1], key[0])
        self._scratch[key] = module.scratch = scratch
        module.post_init(scratch)
        return Borrowed.of(self.name, stored, dtype, module)

    def linear(self, x: Tensor, prepared: Borrowed, bias: Tensor | None) -> Tensor:
        """See `Borrowed.linear`."""
        return prepared.linear(x, bias)


BACKEND = ExllamaV2()
