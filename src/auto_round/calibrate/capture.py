"""What each block is called with: the model runs with every block replaced by a recorder that passes its input on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from auto_round.errors import AutoRoundError, SourceError


@dataclass(frozen=True)
class BlockCall:
    """How the model calls one block: positional arguments after the hidden states, and keyword arguments."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Captured:
    """Hidden states (batch, tokens, hidden) that enter the first block, and the call of every block in order.

    A block that the model leaves out on such input (attention to images, on text) has None for its call.
    """

    hidden: Tensor
    calls: tuple[BlockCall | None, ...]


class NoLogitsError(AutoRoundError):
    """A model that shows no logits when its blocks are left out: what its blocks give is as good as ever."""


class _DoneError(Exception):
    """Raised by the last recorder: nothing behind the blocks has to run."""


# What blocks return: the hidden states, or a tuple that begins with them and is unpacked or indexed.
TUPLE_WIDTHS = (0, 1, 2, 3)


class _Call(NamedTuple):
    block: int
    hidden: Tensor
    call: BlockCall


class _Recorder(nn.Module):
    """Stands in for one block: notes its call and returns its hidden states, in a tuple of `width` unless it is 0.

    With `final` it returns that instead, so that what follows the blocks sees it.
    """

    def __init__(
        self, block: nn.Module, index: int, total: int, record: list[_Call], final: Tensor | None, width: int
    ) -> None:
        super().__init__()
        # Models read attributes such as attention_type off their blocks; a list keeps the block out of the module tree.
        self._block = [block]
        self._index, self._total, self._record, self._final, self._width = index, total, record, final, width

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"][0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Note the call; end the model's forward at the last block."""
        hidden, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        self._record.append(_Call(self._index, hidden, BlockCall(tuple(rest), kwargs)))
        if self._final is not None:
            hidden = self._final
        elif self._index == self._total - 1:
            raise _DoneError
        return (hidden, *[None] * (self._width - 1)) if self._width else hidden


@torch.no_grad()
def capture(
    model: nn.Module, block_names: Sequence[str], tokens: Tensor, beside: Mapping[str, Tensor] = MappingProxyType({})
) -> Captured:
    """Run `model` on tokens (batch, tokens) int64 up to its blocks and note how it calls each of them.

    beside: other inputs of the model, such as pixels. Everything in front of the blocks must be loaded; the blocks need
    not be. Padding needs no mask here: it stands on the right, where causal attention never lets a real token see it.
    Raises SourceError when the model calls its blocks in an unknown way, or changes hidden states between them.
    """
    best: list[_Call] = []
    for width in TUPLE_WIDTHS:
        record = _record(model, block_names, {"input_ids": tokens, **beside}, width=width)
        # A wrong width ends the run after one block, takes one sample for the whole batch, or hands tuples on.
        alike = all(
            isinstance(entry.hidden, Tensor) and entry.hidden.shape == record[0].hidden.shape for entry in record
        )
        if alike and len(record) > len(best):
            best = record
        if len(best) == len(block_names):
            break
    order = [entry.block for entry in best]
    # Leaving out as many as half of the blocks is not known of any model.
    if 2 * len(best) <= len(block_names) or order != sorted(set(order)):
        raise SourceError(
            f"{type(model).__name__} ran {len(set(order))} of its {len(block_names)} blocks in {len(order)} calls with "
            "hidden states of one shape; only models that run each block once in order can be tuned. The recipe rtn "
            "(auto-round-rtn) rounds a model without running it"
        )
    changed = next((entry.block for entry in best if not _same(entry.hidden, best[0].hidden)), None)
    if changed is not None:
        raise SourceError(
            f"{type(model).__name__} changes the hidden states between its blocks, in front of {block_names[changed]}; "
            "on such samples it cannot be tuned block by block. If they are images with text, give text alone; the "
            "recipe rtn (auto-round-rtn) rounds a model without running it"
        )
    calls = {entry.block: entry.call for entry in best}
    return Captured(best[0].hidden, tuple(calls.get(index) for index in range(len(block_names))))


@torch.no_grad()
def inputs_of(
    model: nn.Module,
    block_names: Sequence[str],
    tokens: Tensor,
    hidden: Tensor,
    module: nn.Module,
    beside: Mapping[str, Tensor] = MappingProxyType({}),
) -> Tensor | None:
    """What `module`, somewhere outside the blocks, is given when the last block's output is `hidden`.

    tokens: (batch, tokens) int64; hidden: (batch, tokens, hidden). Everything but the blocks and `module` is loaded.
    None when the model does not run it on text.
    """
    caught: list[Tensor] = []

    def catch(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        caught.append(args[0])
        raise _DoneError

    handle = module.register_forward_pre_hook(catch)
    try:
        for width in TUPLE_WIDTHS:
            _record(model, block_names, {"input_ids": tokens, **beside}, width=width, final=hidden)
            if caught and len(caught[0]) == len(tokens):  # a wrong width may take one sample for the batch
                return caught[0]
            caught.clear()
    finally:
        handle.remove()
    return None


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal, values that are no numbers too."""
    return a is b or torch.equal(a.nan_to_num(), b.nan_to_num())


def _record(
    model: nn.Module,
    block_names: Sequence[str],
    inputs: Mapping[str, Tensor],
    *,
    width: int,
    final: Tensor | None = None,
) -> list[_Call]:
    """Run the model with recorders for blocks; the last one ends the run, or all give `final` and let it go on."""
    record: list[_Call] = []
    blocks = {name: model.get_submodule(name) for name in block_names}
    for index, (name, block) in enumerate(blocks.items()):
        model.set_submodule(name, _Recorder(block, index, len(blocks), record, final, width))
    try:
        model(**inputs, use_cache=False)
    except _DoneError:
        pass
    except torch.OutOfMemoryError:  # a RuntimeError, but none of the model's
        raise
    except (AttributeError, IndexError, TypeError, ValueError, RuntimeError, NotImplementedError):
        # A model that unpacks tuples fails on a bare tensor, and what follows blocks that were left out is not loaded;
        # the caller tries the other ways and judges what was recorded.
        if not record:
            raise
    finally:
        for name, block in blocks.items():
            model.set_submodule(name, block)
    return record


def logits_of(model: nn.Module, block_names: Sequence[str], tokens: Tensor, hidden: Tensor) -> Tensor:
    """Logits (batch, tokens, vocabulary) of the whole model when its last block's output is `hidden`, with a graph if
    `hidden` has one.

    tokens: (batch, tokens) int64; hidden: (batch, tokens, hidden). Everything but the blocks is loaded. Raises
    NoLogitsError when the model does not show a row of them for every hidden state it is handed.
    """
    caught: list[Tensor] = []
    handle = model.register_forward_hook(lambda _, args, output: caught.append(output.logits))
    try:
        for width in TUPLE_WIDTHS:
            _record(model, block_names, {"input_ids": tokens}, width=width, final=hidden)
            # A wrong width may take one sample for the batch; some models look at fewer tokens, or at several streams.
            if caught and caught[0].dim() == 3 and caught[0].shape[:2] == tokens.shape:
                return caught[0]
            caught.clear()
    finally:
        handle.remove()
    raise NoLogitsError(f"{type(model).__name__} gave no logits for each of the hidden states behind its last block")
