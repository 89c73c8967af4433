"""What one choice of the tuner is worth, each alone and over seeds, on samples that the block was not tuned on.

    python -m benchmarks.factors MODEL CALIBRATION SECOND --scheme W2A16G64 --blocks 3,14 [--iters 20] [--out FILE]

MODEL is a folder, CALIBRATION a jsonl with a "text" in each line, SECOND a plain text of another kind. A seed draws
the samples that all blocks are tuned on, those held out and the batches; the blocks before one that is measured are
tuned as usual. What is printed is the loss on other samples, of CALIBRATION and of SECOND, over that of the usual
choice with the same seed and block: the geometric mean over blocks, for each seed.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch
from weakref import WeakKeyDictionary

import torch
from benchmarks.one_block import (
    BATCH,
    CPU,
    OTHERS,
    POOL,
    drawn,
    exact_weights,
    given_text,
    keep,
    open_model,
    parser,
    recipe_of,
    start,
    steps,
    walk_to,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from auto_round.calibrate.dataset import build_calibration
from auto_round.calibrate.selftext import out_of_nothing, write
from auto_round.calibrate.walker import LoadedBlock
from auto_round.numerics import search
from auto_round.numerics.integer import asym_range
from auto_round.runtime.events import LogListener
from auto_round.runtime.rng import generator_for
from auto_round.spec.recipe import Recipe
from auto_round.spec.scheme import Scheme
from auto_round.tune.block import Activations, BlockTask, evaluate, tune_block
from auto_round.tune.layer import TunedLayer

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
EVEN, COSINE = "steps: all of half the first's size", "steps: falling as a cosine"
NEAR, NARROW = "V within half a code of its start", "ranges within 0.8 and 1.25 of the start's"
JUDGES = ("others", "second")  # texts on which a block is judged
BESIDE = (EVEN, COSINE, NEAR, NARROW, MEAN, PLAIN_LOSS, DROPPED, FLOAT_INPUTS, HALF, BUILTIN, SELF)


def texts(options: argparse.Namespace, choices: Iterable[str]) -> dict[str, Tensor]:
    """Token ids (samples, tokens) of everything that goes through the blocks, the text that is tuned on first."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    given = given_text(options)
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
        begin = starts.setdefault(layer, layer.offset.clone())
        usual_step(layer, grad, v_lr, range_lr)
        layer.offset.clamp_(begin - 0.5, begin + 0.5)

    changes: dict[str, AbstractContextManager[Any]] = {
        EVEN: patch.object(TunedLayer, "step", sized(lambda left: 0.5)),
        COSINE: patch.object(TunedLayer, "step", sized(lambda left: (1 - math.cos(math.pi * left)) / 2)),
        NEAR: patch.object(TunedLayer, "step", near),
        NARROW: patch("auto_round.tune.layer.SEARCHED_BOUNDS", (0.8, 1.25)),
        EVERY_ZERO: patch("auto_round.tune.start.search_asym", every_zero),
    }
    return changes.get(name, nullcontext())


@dataclass(frozen=True)
class Block:
    """A block that is tuned again and again; `original` (samples, tokens, hidden) is what the original gives it.

    everything: all samples, with what each token counts when the block is judged.
    """

    loaded: LoadedBlock
    weights: dict[str, Tensor]
    scheme: Scheme
    original: Tensor
    everything: Activations

    @classmethod
    def of(cls, loaded: LoadedBlock, scheme: Scheme, original: Tensor) -> Block:
        """Before it is tuned for the first time."""
        everything = Activations.of(loaded.inputs, loaded.targets, None)
        return cls(loaded, exact_weights(loaded), scheme, original, everything)

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
        return evaluate(self._task(torch.arange(len(self.loaded.inputs))), self.everything, rows, BATCH, CPU)

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
    layers = start(task, activations, recipe)
    sums = {
        name: (torch.zeros_like(layer.offset), torch.zeros_like(layer.multipliers)) for name, layer in layers.items()
    }
    half = recipe.iters // 2
    for iteration in steps(task, layers, activations, recipe, generator):
        if iteration > half:
            for name, layer in layers.items():
                sums[name][0].add_(layer.offset)
                sums[name][1].add_(layer.multipliers)
    for name, layer in layers.items():
        layer.offset, layer.multipliers = (total / (recipe.iters - half) for total in sums[name])
        layer.write_weight(task.linears[name].weight.data)


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
    arguments = parser(__doc__)
    arguments.add_argument("second", type=Path)
    arguments.add_argument("--asym", action="store_true", help="with zero points")
    arguments.add_argument("--blocks", required=True)
    arguments.add_argument("--choices", help="some of the choices, separated by semicolons; all when left out")
    options = arguments.parse_args()
    scheme = replace(Scheme.parse(options.scheme), sym=not options.asym)
    wanted = [int(part) for part in options.blocks.split(",")]
    every = [*RECIPES, *BESIDE, *([] if scheme.sym else [EVERY_ZERO])]
    choices = [USUAL, *options.choices.split(";")] if options.choices else every
    if unknown := [name for name in choices if name not in every]:
        arguments.error(f"no choice is called {unknown[0]!r}; there are {'; '.join(every)}")
    skeleton, names = open_model(options.model)
    kinds = texts(options, choices)
    tokens = torch.cat(list(kinds.values()))
    places = dict(zip(kinds, torch.arange(len(tokens)).split([len(part) for part in kinds.values()]), strict=True))
    usual = recipe_of(options)
    found: dict[str, dict[str, dict[str, dict[str, float]]]] = {text: {} for text in JUDGES}
    for seed in range(options.seeds):
        rows = drawn(seed, options.samples)
        original: Tensor | None = None  # what the original gave before the block
        for loaded in walk_to(skeleton, names[: max(wanted) + 1], tokens):
            block = Block.of(loaded, scheme, loaded.inputs if original is None else original)
            if loaded.index in wanted:
                for name in choices:
                    block.tune(name, places.get(name, places["given"])[rows], usual, seed)
                    for text in JUDGES:
                        loss = block.loss(places[text])
                        found[text].setdefault(str(seed), {}).setdefault(str(loaded.index), {})[name] = loss
                        print(f"seed {seed}, block {loaded.index}, {name}, {text}: {loss:.5g}", flush=True)
            if loaded.index == max(wanted):
                break
            block.tune(USUAL, places["given"][rows], usual, seed)
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
    keep(options, scheme, {"second": options.second.name, "losses": found, "ratios": table})


def ratio(blocks: dict[str, dict[str, float]], name: str) -> float:
    """Geometric mean over blocks of a choice's loss over the usual one's."""
    return math.exp(sum(math.log(losses[name] / losses[USUAL]) for losses in blocks.values()) / len(blocks))


if __name__ == "__main__":
    main()
