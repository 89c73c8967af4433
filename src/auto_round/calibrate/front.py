"""Everything in front of the blocks: embeds tokens, and knows how the model calls each block for any samples.

Most arguments of a block are the same whatever the tokens are (masks, rotary tables) and are kept once for each size of
batch. Those that follow the samples (per-layer embeddings, token ids for hashed routing, positions around images) are
found by comparing all samples with the first, and kept for all of them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from auto_round.calibrate.attention import BlockedAttention
from auto_round.calibrate.capture import BlockCall, Captured, capture
from auto_round.errors import SourceError
from auto_round.source.skeleton import Skeleton


@dataclass(frozen=True)
class Walk:
    """How to walk: batch size of forward passes, whether blocks see the quantised chain, where to compute and in what
    dtype, where activations live (cache: a folder for mapped files, None for memory), whether to compile the blocks'
    forward."""

    batch_size: int
    quantised_inputs: bool
    device: torch.device
    dtype: torch.dtype
    store: torch.device
    compile: bool = False
    cache: Path | None = None


@dataclass(frozen=True, eq=False)
class _Leaf:
    """One tensor that blocks are called with.

    places: (block, number among the arguments) wherever it stands. one: as it is for the first sample alone. dim: its
    dimension of samples; None when it has none, or when what stands there depends on the place in the batch.
    """

    places: tuple[tuple[int, int], ...]
    one: Tensor
    dim: int | None


class Front:
    """Runs what lies in front of the blocks; after `hidden`, `call` answers for every block."""

    def __init__(self, skeleton: Skeleton, block_names: Sequence[str], settings: Walk) -> None:
        self._skeleton, self._names, self._settings = skeleton, block_names, settings
        self._calls: dict[int, list[tuple[list[Any], TreeSpec] | None]] = {}
        self._follows: dict[_Leaf, Tensor] = {}  # (.., samples, size for one sample, ..) at the dimension of samples
        self._order: tuple[int, int] = (0, 1)

    def hidden(self, tokens: Tensor, beside: Sequence[Mapping[str, Tensor]] = ()) -> Tensor:
        """Hidden states (samples, tokens, ...) that enter the first block, for tokens (samples, tokens) int64.

        beside: for every sample the model's other inputs, such as pixels, as for a batch of one; none when empty.

        Raises SourceError when the model's hidden states have no dimensions of samples and tokens, or when what it
        calls its blocks with cannot be told apart by samples.
        """
        settings = self._settings
        with loaded(self._skeleton, outside_blocks(self._skeleton.model, self._names), settings.dtype, settings.device):
            return self._hidden(tokens, beside)

    def _hidden(self, tokens: Tensor, beside: Sequence[Mapping[str, Tensor]]) -> Tensor:
        settings = self._settings
        leaves = self._compare(tokens, beside)
        states: Tensor | None = None
        for begin in range(0, len(tokens), settings.batch_size):
            rows = slice(begin, begin + settings.batch_size)
            captured = self._capture(tokens[rows], beside[rows])
            hidden = captured.hidden.movedim(self._order, (0, 1))
            if states is None:
                states = store((len(tokens), *hidden.shape[1:]), hidden.dtype, settings, "original")
            states[rows] = hidden.to(settings.store)
            for leaf in leaves:
                self._follow(leaf, captured, begin, len(hidden), len(tokens))
        for size in range(1, min(settings.batch_size, len(tokens)) + 1):
            if size not in self._calls:
                self._capture(tokens[:size], beside[:size])
        assert states is not None
        return states

    def _compare(self, tokens: Tensor, beside: Sequence[Mapping[str, Tensor]]) -> list[_Leaf]:
        """Find the dimensions of samples and tokens in hidden states and in what blocks are called with, by comparing
        the first sample with itself twice."""
        single = self._capture(tokens[:1], beside[:1])
        double = self._capture(tokens[[0, 0]], [*beside[:1], *beside[:1]])
        shape = double.hidden.shape
        grown = _grown(single.hidden, double.hidden)
        if grown is None:
            raise SourceError(
                f"the blocks of {type(self._skeleton.model).__name__} take hidden states of shape {tuple(shape)} for "
                "2 samples; a dimension of samples is needed. Recipe rtn rounds a model without running it"
            )
        rest = [d for d in range(len(shape)) if d != grown]
        # Some models put tokens of their own in front, or keep several streams.
        long = [d for d in rest if shape[d] == tokens.shape[1]] or rest
        self._order = (grown, long[0])
        same: dict[tuple[int, int], list[tuple[int, int]]] = {}  # blocks share most of their arguments
        found: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        for block, (a, b) in enumerate(zip(single.calls, double.calls, strict=True)):
            for number, (x, z) in enumerate(zip(_flat(a)[0], _flat(b)[0], strict=True)):
                if isinstance(x, Tensor):
                    same.setdefault((id(x), id(z)), []).append((block, number))
                    found[id(x), id(z)] = x, z
        leaves = []
        for key, (x, z) in found.items():
            dim = _grown(x, z)
            alike = dim is not None and _nearly(_by_sample(z, dim, 2), x.unsqueeze(dim))
            leaves.append(_Leaf(tuple(same[key]), x, dim if alike else None))
        return leaves

    def _follow(self, leaf: _Leaf, captured: Captured, begin: int, count: int, total: int) -> None:
        """Keep what a tensor is for the `count` samples from `begin` on, if it is not the same for all of them."""
        block, number = leaf.places[0]
        known, call = self._calls[count][block], captured.calls[block]
        if known is None or call is None:
            raise self._not_told_apart(block)
        value = _flat(call)[0][number]
        if leaf.dim is None:
            if not torch.equal(known[0][number], value):
                raise self._not_told_apart(block)
            return
        shape = list(leaf.one.shape)
        shape[leaf.dim] *= count
        if list(value.shape) != shape:
            raise self._not_told_apart(block)
        parts = _by_sample(value, leaf.dim, count)
        one = leaf.one.unsqueeze(leaf.dim)
        if leaf not in self._follows:
            if bool((parts == one).all()):
                return
            room = list(one.shape)
            room[leaf.dim] = total
            self._follows[leaf] = store(room, value.dtype, self._settings, f"follows-{len(self._follows)}")
            self._follows[leaf].narrow(leaf.dim, 0, begin).copy_(one)
        self._follows[leaf].narrow(leaf.dim, begin, count).copy_(parts)

    def _not_told_apart(self, block: int) -> SourceError:
        return SourceError(
            f"{type(self._skeleton.model).__name__} calls {self._names[block]} with something that differs between "
            "samples and has no dimension of samples; give samples of one kind: text alone, or images of one size"
        )

    def _capture(self, batch: Tensor, beside: Sequence[Mapping[str, Tensor]]) -> Captured:
        inputs = collated(beside, self._settings.device, self._settings.dtype)
        captured = capture(self._skeleton.model, self._names, batch.to(self._settings.device), inputs)
        calls = [None if call is None else _flat(call) for call in captured.calls]
        self._calls.setdefault(len(batch), calls)
        return captured

    def runs(self, block: int) -> bool:
        """True when the model runs block number `block` on such samples."""
        return all(calls[block] is not None for calls in self._calls.values())

    def call(self, rows: Tensor, block: int, handed: MutableMapping[Any, Any]) -> BlockCall:
        """How the model calls block number `block` for the samples `rows`, int64 indices.

        handed: stands for the empty mapping in which a model's blocks leave values for later ones, if it has one.
        """
        flat = self._calls[len(rows)][block]
        assert flat is not None
        leaves, spec = flat
        follows = {
            number: (leaf, stored)
            for leaf, stored in self._follows.items()
            for where, number in leaf.places
            if where == block
        }
        if follows:
            leaves = list(leaves)
            for number, (leaf, stored) in follows.items():
                assert leaf.dim is not None
                picked = stored.index_select(leaf.dim, rows.to(stored.device)).flatten(leaf.dim, leaf.dim + 1)
                leaves[number] = picked.to(self._settings.device)
        leaves = [handed if isinstance(leaf, MutableMapping) and not leaf else leaf for leaf in leaves]
        args, kwargs = tree_unflatten(leaves, spec)
        return BlockCall(args, kwargs)

    def run(
        self,
        forward: Callable[..., Any],
        block: int,
        hidden: Tensor,
        rows: Tensor,
        handed: MutableMapping[Any, Any],
    ) -> Tensor:
        """Hidden states (batch, tokens, ...) of the samples `rows` through block number `block`, the same shape again.

        forward: the block's own, or compiled. handed: see `call`.
        """
        call = self.call(rows, block, handed)
        with nullcontext() if self._settings.compile else BlockedAttention():
            output = forward(hidden.movedim((0, 1), self._order), *call.args, **call.kwargs)
        states: Tensor = output[0] if isinstance(output, (tuple, list)) else output
        return states.movedim(self._order, (0, 1))


def _grown(single: Tensor, double: Tensor) -> int | None:
    """The dimension in which two samples are twice one, all others being the same."""
    if single.dim() != double.dim():
        return None
    grown = [d for d, (x, z) in enumerate(zip(single.shape, double.shape, strict=True)) if x != z]
    return grown[0] if len(grown) == 1 and double.shape[grown[0]] == 2 * single.shape[grown[0]] else None


def _by_sample(value: Tensor, dim: int, count: int) -> Tensor:
    """(.., samples, size for one sample, ..) of a tensor whose dimension `dim` holds both."""
    parts: Tensor = value.unflatten(dim, (count, -1))
    return parts


def _nearly(parts: Tensor, one: Tensor) -> bool:
    """True when samples are what `one` is, but for what rounding makes of another size of batch."""
    expected = one.float()
    size = float(expected.nan_to_num(0, 0, 0).abs().mean())
    close = torch.isclose(parts.float(), expected, rtol=0.05, atol=0.05 * size, equal_nan=True)
    return float(close.float().mean()) > 0.99


def _flat(call: BlockCall | None) -> tuple[list[Any], TreeSpec]:
    return tree_flatten(None if call is None else (call.args, call.kwargs))


def collated(samples: Sequence[Mapping[str, Tensor]], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """One batch of the inputs beside the tokens: each sample's tensors one after the other, floats in `dtype`."""
    keys = samples[0] if samples else {}
    batch = {key: torch.cat([sample[key] for sample in samples]).to(device) for key in keys}
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}


def store(shape: Sequence[int], dtype: torch.dtype, settings: Walk, name: str) -> Tensor:
    """Room for activations: memory, or a mapped file whose pages the system can write out when memory is short."""
    if settings.cache is None:
        return torch.empty(tuple(shape), dtype=dtype, device=settings.store)
    settings.cache.mkdir(parents=True, exist_ok=True)
    file, count = settings.cache / name, math.prod(shape)
    with file.open("wb") as f:
        # Reserved at once: a page that finds no room on a full disk later would kill the process.
        os.posix_fallocate(f.fileno(), 0, count * dtype.itemsize)
    return torch.from_file(str(file), shared=True, size=count, dtype=dtype).reshape(tuple(shape))


@contextmanager
def loaded(
    skeleton: Skeleton, modules: Sequence[tuple[str, nn.Module]], dtype: torch.dtype, device: torch.device
) -> Iterator[None]:
    """The modules' own parameters and buffers loaded, not those of modules below them; tied weights are there once."""
    read: dict[str, Tensor] = {}

    def weight(name: str) -> Tensor:
        key = (skeleton.is_tied(name) and skeleton.stored_name(name)) or name
        if key not in read:
            value = skeleton.weight(name)
            read[key] = value.to(device, dtype) if value.is_floating_point() else value
        return read[key]

    for name, module in modules:
        skeleton.load(module, name, dtype, device, weight, alone=True)
    read.clear()
    try:
        yield
    finally:
        for name, module in modules:
            skeleton.free(module, name, alone=True)


@contextmanager
def behind_blocks(
    skeleton: Skeleton, block_names: Sequence[str], dtype: torch.dtype, device: torch.device
) -> Iterator[None]:
    """Everything outside the blocks loaded, the head too."""
    head = skeleton.model.get_output_embeddings()
    heads = [(name, module) for name, module in skeleton.model.named_modules() if module is head]
    with loaded(skeleton, [*outside_blocks(skeleton.model, block_names), *heads], dtype, device):
        yield


def outside_blocks(model: nn.Module, block_names: Sequence[str]) -> list[tuple[str, nn.Module]]:
    """Modules with parameters or buffers of their own that lie in no block and are not the output head."""
    head = getattr(model, "get_output_embeddings", lambda: None)()  # transformers' models
    blocks = tuple(f"{name}." for name in block_names)
    found = []
    for name, module in model.named_modules():
        own = any(True for _ in module.named_parameters(recurse=False)) or any(
            True for _ in module.named_buffers(recurse=False)
        )
        if own and not f"{name}.".startswith(blocks) and module is not head:
            found.append((name, module))
    return found
