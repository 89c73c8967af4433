"""The whole model forwards and backwards for a loss on its logits, one block in memory at a time.

Forwards keeps what enters every block; backwards runs each block again from that and passes the gradient on. So memory
is that of one block and of (blocks + 1) hidden states of the samples at hand, and everything is computed once more.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from auto_round.calibrate.capture import logits_of
from auto_round.calibrate.front import Front, Walk, store
from auto_round.calibrate.handed import Left
from auto_round.source.blocks import linears_in
from auto_round.source.skeleton import Skeleton

ReadWeight = Callable[[str], Tensor]  # full name of a parameter -> its values
TakeGradient = Callable[[str, Tensor], None]  # full name of a Linear, dL/dW' (out, in)


class Chain:
    """The model on fixed samples, whose blocks' weights can be given anew for every pass.

    `entering` and `final`: (samples, tokens, hidden), the original's hidden states in front of the first block and
    behind the last.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        block_names: Sequence[str],
        settings: Walk,
        tokens: Tensor,
        beside: Sequence[Mapping[str, Tensor]] = (),
    ) -> None:
        """Run the original on all samples. tokens: (samples, tokens) int64; beside: see `Front.hidden`."""
        self._skeleton, self._names, self._settings, self._tokens = skeleton, block_names, settings, tokens
        self._front = Front(skeleton, block_names, settings)
        self.entering = self._front.hidden(tokens, beside)
        self.final = store(self.entering.shape, self.entering.dtype, settings, "final").copy_(self.entering)
        batches = torch.arange(len(tokens)).split(settings.batch_size)
        left = Left("left", len(tokens), settings)
        self._handed: MutableMapping[Any, Any] = {}
        for index in range(len(block_names)):
            with torch.no_grad(), self._block(index, skeleton.weight) as module:
                if module is None:
                    continue
                for rows in batches:
                    handed = left.view(rows)
                    output = self._front.run(module, index, self.final[rows].to(settings.device), rows, handed)
                    left.keep(handed)
                    self.final[rows] = output.to(self.final.device)

    @torch.no_grad()
    def forward(self, rows: Tensor, weight: ReadWeight) -> list[Tensor]:
        """What enters each block, and last what leaves the last one, for the samples `rows` int64."""
        states = [self.entering[rows].to(self._settings.device)]
        self._handed = UserDict()
        for index in range(len(self._names)):
            with self._block(index, weight) as module:
                states.append(
                    states[-1] if module is None else self._front.run(module, index, states[-1], rows, self._handed)
                )
        return states

    def backward(
        self, rows: Tensor, states: list[Tensor], grad: Tensor, weight: ReadWeight, take: TakeGradient
    ) -> None:
        """Pass dL/d(last state) back through all blocks; `take` is given dL/dW' of each Linear. `states` is emptied.

        To be called after `forward` of the same samples. What blocks leave for later ones beside the hidden states
        (keys and values that layers share) counts as fixed.
        """
        states.pop()
        for index in reversed(range(len(self._names))):
            entering = states.pop().requires_grad_(True)
            with self._block(index, weight) as module:
                if module is None:
                    continue
                linears = linears_in(module, self._names[index] + ".")
                for linear in linears.values():
                    linear.weight.requires_grad_(True)
                self._front.run(module, index, entering, rows, self._handed).backward(grad)
                assert entering.grad is not None
                grad = entering.grad
                for name, linear in linears.items():
                    if linear.weight.grad is not None:  # an expert that no token reached has none
                        take(name, linear.weight.grad)

    def logits(self, rows: Tensor, hidden: Tensor, tokens: slice) -> Tensor:
        """(samples, tokens, vocabulary) for `hidden`, the last state of `rows`, at the positions `tokens` alone.

        Everything outside the blocks must be loaded, see `behind_blocks`.
        """
        ids = self._tokens[rows, tokens].to(self._settings.device)
        return logits_of(self._skeleton.model, self._names, ids, hidden[:, tokens])

    @contextmanager
    def _block(self, index: int, weight: ReadWeight) -> Iterator[nn.Module | None]:
        """The block with its weights in place, or None when the model leaves it out on such samples."""
        name = self._names[index]
        if not self._front.runs(index):
            yield None
            return
        module = self._skeleton.model.get_submodule(name)
        self._skeleton.load(module, name, self._settings.dtype, self._settings.device, weight)
        try:
            yield module
        finally:
            self._skeleton.free(module, name)
