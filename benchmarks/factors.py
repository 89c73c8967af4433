"""What one choice of the tuner is worth, each alone and over seeds, on samples that the block was not tuned on.

    python -m benchmarks.factors MODEL CALIBRATION SECOND --scheme W2A16G64 --blocks 3,14 [--iters 20] [--out FILE]

MODEL is a folder, CALIBRATION a jsonl with a "text" in each line, SECOND a plain text of another kind. A seed draws
the samples that all blocks are tuned on, those held out and the batches; the blocks before one that is measured are
tuned as usual. What is printed is the loss on other samples, of CALIBRATION and of SECOND, over that of the usual
choice with the same seed and block: the geometric mean over blocks, for each seed.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch
from weakref import WeakKeyDictionary

import torch
from benchmarks.figures import calibration
from benchmarks.inference import machine
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from auto_round.calibrate.dataset import build_calibration
from auto_round.calibrate.front import Walk
from auto_round.calibrate.selftext import out_of_nothing, write
from auto_round.calibrate.walker import LoadedBlock, walk
from auto_round.numerics import search
from auto_round.numerics.integer import asym_range
from auto_round.runtime.events import LogListener
from auto_round.runtime.rng import generator_for
from auto_round.source.blocks import block_names, find_block_lists
from auto_round.source.checkpoint import Checkpoint
from auto_round.source.skeleton import Skeleton
from auto_round.spec.recipe import Recipe
from auto_round.spec.scheme import Scheme
from auto_round.tune import block as tuner
from auto_round.tune.block import STATE_BYTES, Activations, BlockTask, evaluate, tune_block
from auto_round.tune.layer import TunedLayer

CPU = torch.device("cpu")
POOL, OTHERS = 48, 16  # samples of each text of which a seed draws some, and samples that none is tuned on
SHARES = 48  # scales that the exhaustive search tries

Change = Callable[[Recipe, int], Recipe]


def with_lr(factor: float) -> Change:
    """V's first step so many times as long, the ranges' as it is."""
    return lambda r, bits: replace(r, lr=factor * r.v_lr(bits), minmax_lr=r.range_lr(bits))


def with_range_lr(factor: float) -> Change:
    """The ranges' first step so many times as long."""
    return lambda r, bits: replace(r, minmax_lr=factor * r.range_lr(bits))


USUAL = "as it is"
RECIPES: dict[str, Change] = {
    USUAL: lambda r, bits: r,
    "start: plain": lambda r, bits: replace(r, start="plain"),
    "start: search": lambda r, bits: replace(r, start="search"),
    "lr of V x 0.5": with_lr(0.5),
    "lr of V x 2": with_lr(2),
    "lr of ranges x 0.4": with_range_lr(0.4),
    "lr of ranges x 2.5": with_range_lr(2.5),
    "ranges fixed": lambda r, bits: replace(r, enable_minmax_tuning=False),
    "no sample held out": lambda r, bits: replace(r, heldout=0),
}
# What changes beside the recipe.
EVERY_ZERO = "start: every scale with every zero point"
MEAN = "kept: mean of the second half's iterates"
PLAIN_LOSS, DROPPED = "loss: plain", "loss: largest 0.1% dropped"
FLOAT_INPUTS, HALF = "inputs of the original", "half the samples"
BUILTIN, SELF = "text: builtin", "text: the model's own"
JUDGES = ("others", "second")
EVEN, COSINE = "steps: all of half the first's size", "steps: falling as a cosine"
NEAR, NARROW = "V within a fifth of a code of its start", "ranges within 5% of the start's"
BESIDE = (EVEN, COSINE, NEAR, NARROW, MEAN, PLAIN_LOSS, DROPPED, FLOAT_INPUTS, HALF, BUILTIN, SELF)


def texts(options: argparse.Namespace, choices: Iterable[str]) -> dict[str, Tensor]:
    """Token ids (samples, tokens) of everything that goes through the blocks, the text that is tuned on first."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    given = torch.tensor(calibration(options.calibration, tokenizer, POOL + OTHERS, options.seqlen))
    kinds = {"given": given[:POOL], "others": given[POOL:]}
    ids = tokenizer(options.second.read_text(encoding="utf-8"), return_tensors="pt")["input_ids"][0]
    pieces = min(OTHERS, len(ids) // options.seqlen)
    kinds["second"] = ids[: pieces * options.seqlen].view(pieces, options.seqlen)
    if BUILTIN in choices:
        size = {"nsamples": POOL, "seqlen": options.seqlen, "seed": 0}
        kinds[BUILTIN] = build_calibration("builtin", tokenizer, **size, listener=LogListener()).tokens
    if SELF in choices:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
        kinds[SELF] = write(model, out_of_nothing(tokenizer, POOL, options.seqlen, seed=0))
    return kinds


def changed(name: str, recipe: Recipe, bits: int) -> AbstractContextManager[Any]:
    """What the tuner has no setting for, while it lasts."""
    usual_step, starts = TunedLayer.step, WeakKeyDictionary[TunedLayer, Tensor]()

    def sized(shape: Callable[[float], float]) -> Callable[[TunedLayer, Tensor, float, float], None]:
        """Steps whose size, a share of the first's, is `shape` of the share that is left of all steps."""

        def step(layer: TunedLayer, grad: Tensor, v_lr: float, range_lr: float) -> None:
            share = shape(v_lr / recipe.v_lr(bits))
            usual_step(layer, grad, share * recipe.v_lr(bits), share * recipe.range_lr(bits))

        return step

    def near(layer: TunedLayer, grad: Tensor, v_lr: float, range_lr: float) -> None:
        start = starts.setdefault(layer, layer.offset.clone())
        usual_step(layer, grad, v_lr, range_lr)
        layer.offset.clamp_(start - 0.2, start + 0.2)

    changes: dict[str, AbstractContextManager[Any]] = {
        EVEN: patch.object(TunedLayer, "step", sized(lambda left: 0.5)),
        COSINE: patch.object(TunedLayer, "step", sized(lambda left: (1 - math.cos(math.pi * left)) / 2)),
        NEAR: patch.object(TunedLayer, "step", near),
        NARROW: patch("auto_round.tune.layer.SEARCHED_BOUNDS", (0.95, 1.05)),
        EVERY_ZERO: patch("auto_round.tune.start.search_asym", every_zero),
    }
    return changes.get(name, nullcontext())


@dataclass(frozen=True)
class Block:
    """A block that is tuned again and again; `original` (samples, tokens, hidden) is what the original gives it."""

    loaded: LoadedBlock
    weights: dict[str, Tensor]
    scheme: Scheme
    original: Tensor

    def tune(self, name: str, rows: Tensor, usual: Recipe, seed: int) -> None:
        """Tune it on the samples `rows` with the choice `name`, and leave the Linears at the result."""
        rows = rows[: len(rows) // 2] if name == HALF else rows
        task, activations, generator = self._task(rows), self._activations(name, rows), generator_for(seed, "block")
        recipe = RECIPES.get(name, RECIPES[USUAL])(usual, self.scheme.bits)
        if name == MEAN:
            tune_to_mean(task, activations, recipe, generator)
            return
        with changed(name, recipe, self.scheme.bits):
            tune_block(task, activations, recipe, generator, CPU, lambda *_: None)

    def loss(self, rows: Tensor) -> float:
        """Of the samples `rows`."""
        every = torch.arange(len(self.loaded.inputs))
        judged = Activations.of(self.loaded.inputs, self.loaded.targets, None)
        return evaluate(self._task(every), judged, rows, 4, CPU)

    def _task(self, rows: Tensor) -> BlockTask:
        """The block as a task whose samples are the `rows` of all."""
        run, linears = self.loaded.run, self.loaded.linears
        assert run is not None
        schemes = dict.fromkeys(linears, self.scheme)
        return BlockTask(lambda hidden, batch: run(hidden, rows[batch]), linears, self.weights, schemes)

    def _activations(self, name: str, rows: Tensor) -> Activations:
        inputs = self.original if name == FLOAT_INPUTS else self.loaded.inputs
        found = Activations.of(inputs[rows], self.loaded.targets[rows], None)
        if name == PLAIN_LOSS:
            return replace(found, weights=torch.ones_like(found.weights))
        if name == DROPPED:
            sizes = found.targets.square().mean(2).flatten()
            weights = torch.ones_like(sizes)
            weights[sizes.topk(len(sizes) // 1000).indices] = 0  # first tokens of texts can all be of one size
            return replace(found, weights=weights.view_as(found.weights))
        return found


def tune_to_mean(task: BlockTask, activations: Activations, recipe: Recipe, generator: torch.Generator) -> None:
    """Leave the Linears at the mean V, alpha and beta of the second half of the steps."""
    room = STATE_BYTES * sum(weight.numel() for weight in task.weights.values())
    layers, _ = tuner._start_layers(task, activations, recipe, CPU, room)
    tuner._write(task, layers)
    sums = {
        name: (torch.zeros_like(layer.offset), torch.zeros_like(layer.multipliers)) for name, layer in layers.items()
    }
    order = torch.arange(len(activations.inputs))
    taken = 0
    for iteration in tuner._steps(task, layers, activations, recipe, order, generator, CPU, lambda *_: None):
        if iteration > recipe.iters // 2:
            taken += 1
            for name, layer in layers.items():
                sums[name][0].add_(layer.offset)
                sums[name][1].add_(layer.multipliers)
    for name, layer in layers.items():
        layer.offset, layer.multipliers = (total / taken for total in sums[name])
    tuner._write(task, layers)


def every_zero(weight: Tensor, importance: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """As `search_asym`, with every zero point for each of many scales (NeUQI, arXiv 2505.17595, with whole zeros)."""
    max_code = (1 << bits) - 1
    low, high = asym_range(weight)
    shares = torch.linspace(0.2, 1.2, SHARES).tolist()

    def candidates() -> Iterable[tuple[Tensor, Tensor]]:
        for share in shares:
            for zero in range(max_code + 1):
                yield (high - low) * (share / max_code), weight.new_full((1, 1, 1), float(zero))

    best = search._best_of(weight, importance, candidates(), max_code)
    return search._refine(weight, importance, best, 1 / SHARES, max_code)


def main() -> None:
    """Measure; print tables and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("--scheme", required=True)
    parser.add_argument("--asym", action="store_true", help="with zero points")
    parser.add_argument("--blocks", required=True)
    parser.add_argument("--iters", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=32, help="that a block is tuned on")
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--choices", help="some of the choices, separated by semicolons; all when left out")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    scheme = replace(Scheme.parse(options.scheme), sym=not options.asym)
    wanted = [int(part) for part in options.blocks.split(",")]
    every = [*RECIPES, *BESIDE, *([] if scheme.sym else [EVERY_ZERO])]
    choices = [USUAL, *options.choices.split(";")] if options.choices else every
    if unknown := [name for name in choices if name not in every]:
        parser.error(f"no choice is called {unknown[0]!r}; there are {'; '.join(every)}")
    skeleton = Skeleton(AutoConfig.from_pretrained(options.model), Checkpoint(options.model))
    names = block_names(skeleton.model, find_block_lists(skeleton.model))
    kinds = texts(options, choices)
    tokens = torch.cat(list(kinds.values()))
    places = dict(zip(kinds, torch.arange(len(tokens)).split([len(part) for part in kinds.values()]), strict=True))
    usual = Recipe(iters=options.iters, nsamples=options.samples, seqlen=options.seqlen, batch_size=4)
    settings = Walk(4, quantised_inputs=True, device=CPU, dtype=torch.float32, store=CPU)
    found: dict[str, dict[str, dict[str, dict[str, float]]]] = {text: {} for text in JUDGES}
    for seed in range(options.seeds):
        drawn = torch.randperm(POOL, generator=generator_for(seed, "samples"))[: options.samples]
        original: Tensor | None = None  # what the original gave before the block
        for loaded in walk(skeleton, names[: max(wanted) + 1], tokens, settings):
            weights = {name: linear.weight.detach().clone() for name, linear in loaded.linears.items()}
            block = Block(loaded, weights, scheme, loaded.inputs if original is None else original)
            if loaded.index in wanted:
                for name in choices:
                    block.tune(name, places.get(name, places["given"])[drawn], usual, seed)
                    for text in JUDGES:
                        loss = block.loss(places[text])
                        found[text].setdefault(str(seed), {}).setdefault(str(loaded.index), {})[name] = loss
                        print(f"seed {seed}, block {loaded.index}, {name}, {text}: {loss:.5g}", flush=True)
            if loaded.index == max(wanted):
                break
            block.tune(USUAL, places["given"][drawn], usual, seed)
            original = loaded.targets.clone()
    table = {
        name: {
            text: [ratio(losses[str(seed)], name) for seed in range(options.seeds)] for text, losses in found.items()
        }
        for name in choices
    }
    print(f"\n| {scheme.name}, {options.iters} steps | of the usual loss, by seed | on {options.second.name} |")
    print("| --- | --- | --- |")
    for name, ratios in table.items():
        shown = (", ".join(f"{value:.3f}" for value in values) for values in ratios.values())
        print(f"| {name} | {' | '.join(shown)} |")
    if options.out:
        job: dict[str, Any] = {"model": options.model.name, "scheme": scheme.name, "iters": options.iters}
        rest = {"samples": options.samples, "seqlen": options.seqlen, "second": options.second.name}
        figures = {"machine": machine(), "losses": found, "ratios": table}
        options.out.write_text(json.dumps({**job, **rest, **figures}, indent=1) + "\n")


def ratio(blocks: dict[str, dict[str, float]], name: str) -> float:
    """Geometric mean over blocks of a choice's loss over the usual one's."""
    return math.exp(sum(math.log(losses[name] / losses[USUAL]) for losses in blocks.values()) / len(blocks))


if __name__ == "__main__":
    main()
