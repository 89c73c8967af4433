"""Block after block: load it, run it in float on the original chain, have it tuned, run it quantised, free it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from auto_round.calibrate.capture import BlockCall, Captured, capture, inputs_of
from auto_round.source.blocks import linears_in
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


@dataclass(frozen=True)
class LoadedBlock:
    """One block with its weights in place, and the chains' activations in front of it and behind.

    run: hidden states (batch, tokens, hidden) -> output of the same shape. linears: all Linears by full name.
    inputs: (samples, tokens, hidden), what the block will see. targets: what the original gives; both on `Walk.store`.
    """

    index: int
    name: str
    module: nn.Module
    run: Callable[[Tensor], Tensor]
    linears: Mapping[str, nn.Linear]
    inputs: Tensor
    targets: Tensor


def walk(skeleton: Skeleton, block_names: Sequence[str], tokens: Tensor, settings: Walk) -> Iterator[LoadedBlock]:
    """Yield every block in order; the consumer leaves its Linears at their quantised weights before asking on.

    tokens: (samples, tokens) int64. Both chains are updated in place, so activations cost twice
    samples * tokens * hidden values whatever the depth of the model.
    """
    front = _Front(skeleton, block_names, settings)
    original = front.hidden(tokens)
    quantised = _copy(original, settings, "quantised") if settings.quantised_inputs else original
    for index, name in enumerate(block_names):
        module = skeleton.model.get_submodule(name)
        skeleton.load(module, name, settings.dtype, settings.device)
        forward: Callable[..., Any] = torch.compile(module, dynamic=False) if settings.compile else module
        run = _runner(forward, front, index)
        inputs = quantised
        # Without a chain of its own the original's output is the next input: two stores take turns.
        targets = original if settings.quantised_inputs else _copy(original, settings, f"targets-{index % 2}")
        _forward(run, original, targets, settings)
        yield LoadedBlock(index, name, module, run, linears_in(module, name + "."), inputs, targets)
        if settings.quantised_inputs:
            _forward(run, quantised, quantised, settings)
        else:
            original = quantised = targets
        skeleton.free(module, name)


class _Front:
    """Everything in front of the blocks: embeds tokens and knows how each block is called for a batch size."""

    def __init__(self, skeleton: Skeleton, block_names: Sequence[str], settings: Walk) -> None:
        self._skeleton, self._names, self._settings = skeleton, block_names, settings
        self._calls: dict[int, tuple[BlockCall, ...]] = {}
        self._sample: Tensor | None = None

    def hidden(self, tokens: Tensor) -> Tensor:
        """Hidden states (samples, tokens, hidden) that enter the first block; notes the calls for every batch size."""
        settings = self._settings
        outside = outside_blocks(self._skeleton.model, self._names)
        for name, module in outside:
            self._skeleton.load(module, name, settings.dtype, settings.device)
        states: Tensor | None = None
        for begin in range(0, len(tokens), settings.batch_size):
            hidden = self._capture(tokens[begin : begin + settings.batch_size]).hidden
            if states is None:
                states = _store((len(tokens), *hidden.shape[1:]), hidden.dtype, settings, "original")
            states[begin : begin + len(hidden)] = hidden.to(settings.store)
        for size in range(1, min(settings.batch_size, len(tokens)) + 1):
            if size not in self._calls:
                self._capture(tokens[:size])
        for name, module in outside:
            self._skeleton.free(module, name)
        assert states is not None
        return states

    def _capture(self, batch: Tensor) -> Captured:
        captured = capture(self._skeleton.model, self._names, batch.to(self._settings.device))
        self._calls.setdefault(len(batch), captured.calls)
        return captured

    def call(self, batch: int, index: int) -> BlockCall:
        """How the model calls block `index` for a batch of that many samples."""
        return self._calls[batch][index]


def head_inputs(
    skeleton: Skeleton, block_names: Sequence[str], tokens: Tensor, hidden: Tensor, head: nn.Module, settings: Walk
) -> Iterator[tuple[slice, Tensor]]:
    """Yield (samples, inputs of `head`) batch by batch, `hidden` being the last block's output for all samples."""
    outside = [(name, module) for name, module in outside_blocks(skeleton.model, block_names) if module is not head]
    for name, module in outside:
        skeleton.load(module, name, settings.dtype, settings.device)
    for begin in range(0, len(tokens), settings.batch_size):
        rows = slice(begin, begin + settings.batch_size)
        batch, states = tokens[rows].to(settings.device), hidden[rows].to(settings.device)
        yield rows, inputs_of(skeleton.model, block_names, batch, states, head)
    for name, module in outside:
        skeleton.free(module, name)


def outside_blocks(model: nn.Module, block_names: Sequence[str]) -> list[tuple[str, nn.Module]]:
    """Modules with parameters or buffers of their own that lie in no block and are not the output head."""
    head = getattr(model, "get_output_embeddings", lambda: None)()  # transformers' models
    found = []
    for name, module in model.named_modules():
        own = any(True for _ in module.named_parameters(recurse=False)) or any(
            True for _ in module.named_buffers(recurse=False)
        )
        inside = any(name == block or name.startswith(block + ".") for block in block_names)
        if own and not inside and module is not head:
            found.append((name, module))
    return found


def _store(shape: Sequence[int], dtype: torch.dtype, settings: Walk, name: str) -> Tensor:
    """Room for activations: memory, or a mapped file whose pages the system can write out when memory is short."""
    if settings.cache is None:
        return torch.empty(tuple(shape), dtype=dtype, device=settings.store)
    settings.cache.mkdir(parents=True, exist_ok=True)
    file, count = settings.cache / name, math.prod(shape)
    with file.open("wb") as f:
        # Reserved at once: a page that finds no room on a full disk later would kill the process.
        os.posix_fallocate(f.fileno(), 0, count * dtype.itemsize)
    return torch.from_file(str(file), shared=True, size=count, dtype=dtype).reshape(tuple(shape))


def _copy(original: Tensor, settings: Walk, name: str) -> Tensor:
    return _store(original.shape, original.dtype, settings, name).copy_(original)


def _runner(forward: Callable[..., Any], front: _Front, index: int) -> Callable[[Tensor], Tensor]:
    def run(hidden: Tensor) -> Tensor:
        call = front.call(hidden.shape[0], index)
        output = forward(hidden, *call.args, **call.kwargs)
        states: Tensor = output[0] if isinstance(output, tuple) else output
        return states

    return run


@torch.no_grad()
def _forward(run: Callable[[Tensor], Tensor], inputs: Tensor, outputs: Tensor, settings: Walk) -> None:
    """Run all samples through the block, batch by batch; outputs may be the same tensor as inputs."""
    for begin in range(0, len(inputs), settings.batch_size):
        rows = slice(begin, begin + settings.batch_size)
        outputs[rows] = run(inputs[rows].to(settings.device)).to(outputs.device)
