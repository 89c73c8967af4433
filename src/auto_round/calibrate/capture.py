"""What each block is called with: the model runs with every block replaced by a recorder that passes its input on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from auto_round.errors import SourceError


@dataclass(frozen=True)
class BlockCall:
    """How the model calls one block: positional arguments after the hidden states, and keyword arguments."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Captured:
    """Hidden states (batch, tokens, hidden) that enter the first block, and the call of every block in order."""

    hidden: Tensor
    calls: tuple[BlockCall, ...]


class _DoneError(Exception):
    """Raised by the last recorder: nothing behind the blocks has to run."""


class _Recorder(nn.Module):
    """Stands in for one block: notes its call and returns its hidden states, in a tuple if the model wants one."""

    def __init__(
        self,
        block: nn.Module,
        record: list[tuple[Tensor, BlockCall]],
        total: int,
        final: Tensor | None,
        *,
        in_tuple: bool,
    ) -> None:
        super().__init__()
        # Models read attributes such as attention_type off their blocks; a list keeps the block out of the module tree.
        self._block = [block]
        self._record, self._total, self._final, self._in_tuple = record, total, final, in_tuple

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"][0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Note the call; end the model's forward at the last block."""
        hidden, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        self._record.append((hidden, BlockCall(tuple(rest), kwargs)))
        if len(self._record) == self._total:
            if self._final is None:
                raise _DoneError
            hidden = self._final
        return (hidden,) if self._in_tuple else hidden


def capture(model: nn.Module, block_names: Sequence[str], tokens: Tensor) -> Captured:
    """Run `model` on tokens (batch, tokens) int64 up to its blocks and note how it calls each of them.

    Everything in front of the blocks must be loaded; the blocks need not be. Padding needs no mask here: it stands on
    the right, where causal attention never lets a real token see it. Raises SourceError when the model calls its blocks
    in an unknown way.
    """
    for in_tuple in (False, True):
        record = _record(model, block_names, tokens, in_tuple=in_tuple)
        shapes = {tuple(hidden.shape) for hidden, _ in record}
        if len(record) == len(block_names) and len(shapes) == 1:
            return Captured(record[0][0], tuple(call for _, call in record))
    raise SourceError(
        f"{type(model).__name__} ran {len(record)} of its {len(block_names)} blocks, with hidden states of shapes "
        f"{sorted(shapes)}; only models that run each block once on hidden states of one shape can be tuned"
    )


@torch.no_grad()
def inputs_of(
    model: nn.Module, block_names: Sequence[str], tokens: Tensor, hidden: Tensor, module: nn.Module
) -> Tensor:
    """What `module`, somewhere behind the blocks, is given when the last block's output is `hidden`.

    tokens: (batch, tokens) int64; hidden: (batch, tokens, hidden). Everything but the blocks and `module` is loaded.
    """
    caught: list[Tensor] = []

    def catch(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        caught.append(args[0])
        raise _DoneError

    handle = module.register_forward_pre_hook(catch)
    try:
        for in_tuple in (False, True):
            _record(model, block_names, tokens, in_tuple=in_tuple, final=hidden)
            if caught:
                return caught[0]
    finally:
        handle.remove()
    raise SourceError(f"{type(model).__name__} never ran the layer behind its blocks that is to be quantised")


def _record(
    model: nn.Module, block_names: Sequence[str], tokens: Tensor, *, in_tuple: bool, final: Tensor | None = None
) -> list[tuple[Tensor, BlockCall]]:
    """Run the model with recorders for blocks; the last one ends the run, or gives `final` and lets it go on."""
    record: list[tuple[Tensor, BlockCall]] = []
    blocks = {name: model.get_submodule(name) for name in block_names}
    for name, block in blocks.items():
        model.set_submodule(name, _Recorder(block, record, len(blocks), final, in_tuple=in_tuple))
    try:
        with torch.no_grad():
            model(input_ids=tokens, use_cache=False)
    except _DoneError:
        pass
    except (AttributeError, IndexError, TypeError, ValueError, RuntimeError):
        # A model that unpacks tuples fails on a bare tensor; the caller tries the other way and reports.
        if in_tuple:
            raise
    finally:
        for name, block in blocks.items():
            model.set_submodule(name, block)
    return record


def logits_of(model: nn.Module, block_names: Sequence[str], tokens: Tensor, hidden: Tensor) -> Tensor:
    """Logits (batch, tokens, vocabulary) of the whole model when its last block's output is `hidden`.

    tokens: (batch, tokens) int64; hidden: (batch, tokens, hidden). Everything but the blocks is loaded.
    """
    caught: list[Tensor] = []
    handle = model.register_forward_hook(lambda _, args, output: caught.append(output.logits))
    try:
        for in_tuple in (False, True):
            _record(model, block_names, tokens, in_tuple=in_tuple, final=hidden)
            if caught:
                return caught[0]
    finally:
        handle.remove()
    raise SourceError(f"{type(model).__name__} gave no logits for the hidden states behind its last block")
