"""Second moments of the inputs of a block's Linears, gathered while the block runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor, nn

SPAN = 256  # inputs whose products are taken at once
ENOUGH = 10  # tokens for each input: more of the model's own text change nothing (docs/ablations.md)


@dataclass(frozen=True)
class Moment:
    """Mean of x x^T, (in, in) float32, and over how many tokens."""

    mean: Tensor
    tokens: int


class Moments:
    """Mean of x x^T over the tokens each Linear sees, as a context around the block's forward passes.

    Linears that read the very same tensor (q, k, v; gate, up) share one sum. Set `mask` before each forward. Sums take
    at most `room` bytes, but one is always taken; those that found no room are `left` for another round of the same
    forward passes. None: as many as there are.
    """

    def __init__(self, linears: Mapping[str, nn.Linear], room: int | None = None) -> None:
        self.mask: Tensor | None = None
        self._linears = linears
        self._room = room
        self._left: set[str] = set()
        self._owner: dict[str, str] = {}
        self._sums: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}
        self._seen: list[tuple[Tensor, str]] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Moments:
        for name, module in self._linears.items():
            self._handles.append(
                module.register_forward_pre_hook(lambda _, args, name=name: self.observe(name, args[0]))
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._seen.clear()

    def next_batch(self, mask: Tensor | None) -> None:
        """Say which tokens of the coming batch count: (batch, tokens) bool, None for all."""
        self.mask = mask
        self._seen.clear()

    def owner(self, name: str) -> str:
        """Return the Linear whose moment `name` shares; itself when it shares none."""
        return self._owner.get(name, name)

    def reached(self, name: str) -> bool:
        """True when a token came to the layer."""
        return bool(self._tokens.get(self.owner(name)))

    def known(self) -> bool:
        """True when every moment that found room is of ENOUGH tokens for each input."""
        counts = {name: self._tokens.get(self.owner(name), 0) for name in set(self._linears) - set(self.left())}
        return all(count >= ENOUGH * self._linears[name].in_features for name, count in counts.items())

    def left(self) -> list[str]:
        """Linears whose moment found no room."""
        return [name for name in self._linears if self.owner(name) in self._left]

    def shared(self) -> list[list[str]]:
        """Linears that share one moment, in lists; those with most inputs first, whose start takes most memory.

        Those that are left are not among them.
        """
        lists: dict[str, list[str]] = {}
        for name in (name for name in self._linears if self.owner(name) not in self._left):
            lists.setdefault(self.owner(name), []).append(name)
        return sorted(lists.values(), key=lambda names: -self._linears[names[0]].in_features)

    def take(self, name: str) -> Moment | None:
        """The layer's moment, or None when no token reached it. It is forgotten here."""
        owner = self.owner(name)
        total = self._sums.pop(owner, None)
        if total is None or not self._tokens[owner]:
            return None
        for begin, end in _spans(len(total)):
            total[:begin, begin:end] = total[begin:end, :begin].t()
        return Moment(total.div_(self._tokens[owner]), self._tokens[owner])

    def observe(self, name: str, inputs: Tensor) -> None:
        """Add what the Linear `name` is given: (batch, tokens, in), or (rows, in) where a model regroups tokens."""
        # References are kept until the next batch: an address freed and used again must not look like the same tensor.
        shared = next((owner for tensor, owner in self._seen if tensor is inputs), None)
        if shared is not None and self._owner.get(name, shared) == shared:
            self._owner[name] = shared
            return
        self._owner[name] = name
        self._seen.append((inputs, name))
        if name in self._left or (name not in self._sums and not self._fits(inputs.shape[-1])):
            self._left.add(name)
            return
        rows = inputs.reshape(-1, inputs.shape[-1])
        if self.mask is not None and len(rows) == self.mask.numel():  # an expert is given some tokens only
            rows = rows[self.mask.flatten()]
        rows = rows.float()
        if name not in self._sums:
            self._sums[name] = rows.new_zeros(rows.shape[1], rows.shape[1])
            self._tokens[name] = 0
        # The sum is symmetric: what lies right of the diagonal is copied in `take`.
        for begin, end in _spans(rows.shape[1]):
            self._sums[name][begin:end, :end].addmm_(rows[:, begin:end].t(), rows[:, :end])
        self._tokens[name] += rows.shape[0]

    def _fits(self, width: int) -> bool:
        held = sum(total.numel() for total in self._sums.values())
        return self._room is None or not self._sums or 4 * (held + width**2) <= self._room


def _spans(width: int) -> list[tuple[int, int]]:
    return [(begin, min(begin + SPAN, width)) for begin in range(0, width, SPAN)]
