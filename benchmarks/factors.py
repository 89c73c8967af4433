"""What one choice of the tuner is worth, each alone and over seeds, on samples that the block was not tuned on.

    python -m benchmarks.factors MODEL CALIBRATION --scheme W2A16G64 --blocks 3,14 [--iters 20] [--out FILE]

MODEL is a folder, CALIBRATION a jsonl with a "text" in each line. The blocks before one that is tuned are those of the
start, without steps. A seed draws the samples that are tuned on, those held out and the batches. What is printed is
the loss on the other samples over that of the usual choice with the same seed and block: the geometric mean over
blocks, for each seed.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from benchmarks.figures import calibration
from benchmarks.inference import machine
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from auto_round.calibrate.front import Walk
from auto_round.calibrate.walker import LoadedBlock, walk
from auto_round.runtime.rng import generator_for
from auto_round.source.blocks import block_names, find_block_lists
from auto_round.source.checkpoint import Checkpoint
from auto_round.source.skeleton import Skeleton
from auto_round.spec.recipe import Recipe
from auto_round.spec.scheme import Scheme
from auto_round.tune.block import Activations, BlockTask, evaluate, tune_block

CPU = torch.device("cpu")
TRAIN, OTHERS = 32, 16  # samples of which a seed tunes on TRAIN, and samples that none is tuned on
POOL = 48

Change = Callable[[Recipe, int], Recipe]


def with_lr(factor: float) -> Change:
    """V's first step so many times as long, the ranges' as it is."""
    return lambda r, bits: replace(r, lr=factor * r.v_lr(bits), minmax_lr=r.range_lr(bits))


def with_range_lr(factor: float) -> Change:
    """The ranges' first step so many times as long."""
    return lambda r, bits: replace(r, minmax_lr=factor * r.range_lr(bits))


RECIPES: dict[str, Change] = {
    "as it is": lambda r, bits: r,
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
PLAIN_LOSS, DROPPED, FLOAT_INPUTS, HALF = (
    "loss: plain",
    "loss: largest 0.1% dropped",
    "inputs of the original",
    "half the samples",
)
BESIDE = (PLAIN_LOSS, DROPPED, FLOAT_INPUTS, HALF)


def tuned_on(name: str, rows: Tensor, inputs: Tensor, original: Tensor, targets: Tensor) -> Activations:
    """The activations of the samples `rows`, changed as `name` says."""
    if name == HALF:
        rows = rows[: len(rows) // 2]
    found = Activations.of((original if name == FLOAT_INPUTS else inputs)[rows], targets[rows], None)
    if name == PLAIN_LOSS:
        return replace(found, weights=torch.ones_like(found.weights))
    if name == DROPPED:
        sizes = found.targets.square().mean(2)
        return replace(found, weights=(sizes <= sizes.flatten().quantile(0.999)).float())
    return found


def task_of(loaded: LoadedBlock, weights: dict[str, Tensor], scheme: Scheme, rows: Tensor | None) -> BlockTask:
    """The block as a task whose samples are the `rows` of all."""
    run = loaded.run
    assert run is not None
    chosen = run if rows is None else (lambda hidden, batch: run(hidden, rows[batch]))
    return BlockTask(chosen, loaded.linears, weights, dict.fromkeys(loaded.linears, scheme))


def main() -> None:
    """Measure; print a table and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("--scheme", required=True)
    parser.add_argument("--blocks", required=True)
    parser.add_argument("--iters", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    scheme, wanted = Scheme.parse(options.scheme), [int(part) for part in options.blocks.split(",")]
    skeleton = Skeleton(AutoConfig.from_pretrained(options.model), Checkpoint(options.model))
    names = block_names(skeleton.model, find_block_lists(skeleton.model))
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokens = torch.tensor(calibration(options.calibration, tokenizer, POOL + OTHERS, options.seqlen))
    usual = Recipe(iters=options.iters, nsamples=TRAIN, seqlen=options.seqlen, batch_size=4)
    settings = Walk(4, quantised_inputs=True, device=CPU, dtype=torch.float32, store=CPU)
    found: dict[str, dict[str, dict[str, float]]] = {}
    previous: Tensor | None = None  # what the original gave before the block
    for loaded in walk(skeleton, names[: max(wanted) + 1], tokens, settings):
        weights = {name: linear.weight.detach().clone() for name, linear in loaded.linears.items()}
        everything = Activations.of(loaded.inputs, loaded.targets, None)
        others = torch.arange(POOL, POOL + OTHERS)
        if loaded.index in wanted:
            original = loaded.inputs if previous is None else previous
            for seed in range(options.seeds):
                rows = torch.randperm(POOL, generator=generator_for(seed, "samples"))[:TRAIN]
                losses = found.setdefault(str(seed), {}).setdefault(str(loaded.index), {})
                for name in (*RECIPES, *BESIDE):
                    recipe = RECIPES.get(name, RECIPES["as it is"])(usual, scheme.bits)
                    activations = tuned_on(name, rows, loaded.inputs, original, loaded.targets)
                    task = task_of(loaded, weights, scheme, rows)
                    tuned = tune_block(task, activations, recipe, generator_for(seed, "block"), CPU, lambda *_: None)
                    losses[name] = evaluate(task_of(loaded, weights, scheme, None), everything, others, 4, CPU)
                    print(
                        f"block {loaded.index}, seed {seed}, {name}: {losses[name]:.5g}, step {tuned.kept_iteration}",
                        flush=True,
                    )
        if loaded.index == max(wanted):
            break
        previous = loaded.targets.clone() if loaded.index + 1 in wanted else None
        start = replace(usual, iters=0)
        rows = torch.arange(TRAIN)
        first = tuned_on("as it is", rows, loaded.inputs, loaded.inputs, loaded.targets)
        tune_block(
            task_of(loaded, weights, scheme, rows), first, start, generator_for(0, "block"), CPU, lambda *_: None
        )
    table = {name: [ratio(found[str(seed)], name) for seed in range(options.seeds)] for name in (*RECIPES, *BESIDE)}
    print(f"\n| {options.scheme}, {options.iters} steps | of the usual loss, by seed |\n| --- | --- |")
    for name, ratios in table.items():
        print(f"| {name} | {', '.join(f'{value:.4f}' for value in ratios)} |")
    if options.out:
        job: dict[str, Any] = {"model": options.model.name, "scheme": options.scheme, "iters": options.iters}
        rest = {"samples": TRAIN, "seqlen": options.seqlen, "machine": machine(), "losses": found, "ratios": table}
        options.out.write_text(json.dumps({**job, **rest}, indent=1) + "\n")


def ratio(blocks: dict[str, dict[str, float]], name: str) -> float:
    """Geometric mean over blocks of a choice's loss over the usual one's."""
    return math.exp(sum(math.log(losses[name] / losses["as it is"]) for losses in blocks.values()) / len(blocks))


if __name__ == "__main__":
    main()
