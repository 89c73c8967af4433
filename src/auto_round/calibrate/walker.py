"""Block after block: load it, run it in float on the original chain, have it tuned, run it quantised, free it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from auto_round.calibrate.capture import inputs_of
from auto_round.calibrate.front import Front, Walk, collated, loaded, outside_blocks, store
from auto_round.calibrate.handed import Left
from auto_round.source.blocks import linears_in
from auto_round.source.skeleton import Skeleton

Run = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class LoadedBlock:
    """One block with its weights in place, and the chains' activations in front of it and behind.

    run: hidden states (batch, tokens, hidden) of the samples whose int64 indices are given -> output of the same shape.
    eager: the same, not compiled, where `run` is compiled. linears: all Linears by full name.
    inputs: (samples, tokens, hidden), what the block will see. targets: what the original gives; both on `Walk.store`.
    run is None for a block that the model leaves out on these samples; inputs and targets are then those of the next.
    """

    index: int
    name: str
    module: nn.Module
    run: Run | None
    eager: Run | None
    linears: Mapping[str, nn.Linear]
    inputs: Tensor
    targets: Tensor


def walk(
    skeleton: Skeleton,
    block_names: Sequence[str],
    tokens: Tensor,
    settings: Walk,
    beside: Sequence[Mapping[str, Tensor]] = (),
) -> Iterator[LoadedBlock]:
    """Yield every block in order; the consumer leaves its Linears at their quantised weights before asking on.

    tokens: (samples, tokens) int64; beside: the samples' other inputs, if any (see `Front.hidden`). Both chains are
    updated in place, so activations cost twice samples * tokens * hidden values whatever the depth of the model.
    """
    front = Front(skeleton, block_names, settings)
    original = front.hidden(tokens, beside)
    left = Left("left", len(tokens), settings)
    left_quantised = Left("left-quantised", len(tokens), settings) if settings.quantised_inputs else left
    quantised = _room(original, settings, "quantised").copy_(original) if settings.quantised_inputs else original
    spare: Tensor | None = None
    for index, name in enumerate(block_names):
        module = skeleton.model.get_submodule(name)
        if not front.runs(index):
            yield LoadedBlock(index, name, module, None, None, linears_in(module, name + "."), quantised, original)
            continue
        skeleton.load(module, name, settings.dtype, settings.device)
        forward: Callable[..., Any] = torch.compile(module, dynamic=False) if settings.compile else module
        run = _runner(forward, front, index, left_quantised)
        eager = _runner(module, front, index, left_quantised) if settings.compile else None
        inputs = quantised
        # Without a chain of its own the original's output is the next input: two stores take turns.
        targets = original
        if not settings.quantised_inputs:
            targets = _room(original, settings, "spare") if spare is None else spare
        _forward(_runner(forward, front, index, left, keep=True), original, targets, settings)
        yield LoadedBlock(index, name, module, run, eager, linears_in(module, name + "."), inputs, targets)
        if settings.quantised_inputs:
            _forward(_runner(forward, front, index, left_quantised, keep=True), quantised, quantised, settings)
        else:
            spare, original, quantised = original, targets, targets
        skeleton.free(module, name)


def head_inputs(
    skeleton: Skeleton,
    block_names: Sequence[str],
    tokens: Tensor,
    hidden: Tensor,
    head: nn.Module,
    settings: Walk,
    beside: Sequence[Mapping[str, Tensor]] = (),
) -> Iterator[tuple[slice, Tensor]]:
    """Yield (samples, inputs of `head`) batch by batch, `hidden` being the last block's output for all samples.

    Nothing is yielded when the model does not run `head` on text.
    """
    outside = [(name, module) for name, module in outside_blocks(skeleton.model, block_names) if module is not head]
    with loaded(skeleton, outside, settings.dtype, settings.device):
        for begin in range(0, len(tokens), settings.batch_size):
            rows = slice(begin, begin + settings.batch_size)
            batch, states = tokens[rows].to(settings.device), hidden[rows].to(settings.device)
            more = collated(beside[rows], settings.device, settings.dtype)
            inputs = inputs_of(skeleton.model, block_names, batch, states, head, more)
            if inputs is not None:
                yield rows, inputs


def _room(like: Tensor, settings: Walk, name: str) -> Tensor:
    return store(like.shape, like.dtype, settings, name)


def _runner(forward: Callable[..., Any], front: Front, index: int, left: Left, *, keep: bool = False) -> Run:
    """left: what earlier blocks left for later ones in the chain; keep: take over what this block leaves."""

    def run(hidden: Tensor, rows: Tensor) -> Tensor:
        handed = left.view(rows)
        output = front.run(forward, index, hidden, rows, handed)
        if keep:
            left.keep(handed)
        return output

    return run


@torch.no_grad()
def _forward(run: Run, inputs: Tensor, outputs: Tensor, settings: Walk) -> None:
    """Run all samples through the block, batch by batch; outputs may be the same tensor as inputs."""
    for rows in torch.arange(len(inputs)).split(settings.batch_size):
        outputs[rows] = run(inputs[rows].to(settings.device), rows).to(outputs.device)
