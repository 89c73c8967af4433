"""What it is worth to tune two blocks at once, over seeds, on samples that they were not tuned on.

    python -m benchmarks.windows MODEL CALIBRATION --scheme W2A16G64 --pairs 0,14,28 [--iters 20] [--out FILE]

A pair is the first of two blocks. A seed draws the samples that all blocks are tuned on, and the batches; those before
a pair are tuned one after the other. What is printed is the loss behind the second block on other samples, over that of
the two tuned one after the other, for each pair and seed. The last iterate is kept in all cases.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from benchmarks.one_block import (
    BATCH,
    CPU,
    OTHERS,
    POOL,
    Layers,
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

from auto_round.calibrate.walker import LoadedBlock
from auto_round.runtime.rng import generator_for
from auto_round.spec.recipe import Recipe
from auto_round.spec.scheme import Scheme
from auto_round.tune.block import Activations, BlockTask, evaluate

IN_TURN, AT_ONCE, AND_AT_ONCE, AND_SHORT, TWICE = (
    "one after the other",
    "both at once",
    "one after the other, then both at once",
    "the same, the steps of both a quarter as long",
    "one after the other, twice the steps",
)


@dataclass(frozen=True)
class Part:
    """One of the two blocks: how it runs, its exact weights, and what the original gives behind it."""

    loaded: LoadedBlock
    weights: dict[str, Tensor]
    targets: Tensor

    @classmethod
    def of(cls, loaded: LoadedBlock) -> Part:
        """With copies of what the walk goes on to change."""
        return cls(loaded, exact_weights(loaded), loaded.targets.clone())

    def run(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """The block's output for these samples."""
        assert self.loaded.run is not None
        return self.loaded.run(hidden, rows)


@dataclass(frozen=True)
class Pair:
    """Two blocks, `inputs` (samples, tokens, hidden) of the first, and how they are tuned on the samples `rows`."""

    first: Part
    second: Part
    inputs: Tensor
    rows: Tensor
    scheme: Scheme
    recipe: Recipe
    seed: int

    def task(self, *parts: Part, rows: Tensor | None = None) -> BlockTask:
        """The parts behind each other as one block, of the samples `rows`."""
        rows = self.rows if rows is None else rows
        linears = {name: linear for part in parts for name, linear in part.loaded.linears.items()}
        weights = {name: weight for part in parts for name, weight in part.weights.items()}

        def run(hidden: Tensor, batch: Tensor) -> Tensor:
            for part in parts:
                hidden = part.run(hidden, rows[batch])
            return hidden

        return BlockTask(run, linears, weights, dict.fromkeys(linears, self.scheme))

    def start(self, part: Part, inputs: Tensor) -> Layers:
        """The layers of one block where tuning starts, their weights written."""
        return start(self.task(part), self.activations(inputs, part), self.recipe)

    def activations(self, inputs: Tensor, part: Part) -> Activations:
        """What is tuned on, up to what the original gives behind `part`."""
        return Activations.of(inputs[self.rows], part.targets[self.rows], None)

    def step(self, layers: Layers, inputs: Tensor, *parts: Part, iters: int, size: float = 1.0) -> None:
        """Move the layers of these parts by `iters` steps, `size` times as long as usual."""
        recipe, generator, bits = replace(self.recipe, iters=iters), generator_for(self.seed, "block"), self.scheme.bits
        recipe = replace(recipe, lr=size * recipe.v_lr(bits), minmax_lr=size * recipe.range_lr(bits))
        for _ in steps(self.task(*parts), layers, self.activations(inputs, parts[-1]), recipe, generator):
            pass

    @torch.no_grad()
    def between(self) -> Tensor:
        """What the first block, as it is now, gives the second."""
        return torch.cat([self.first.run(self.inputs[b], b) for b in torch.arange(len(self.inputs)).split(BATCH)])

    def in_turn(self, iters: int) -> Layers:
        """Tune one after the other."""
        first = self.start(self.first, self.inputs)
        self.step(first, self.inputs, self.first, iters=iters)
        between = self.between()
        second = self.start(self.second, between)
        self.step(second, between, self.second, iters=iters)
        return first | second

    def at_once(self) -> None:
        """Start one after the other, then tune both."""
        first = self.start(self.first, self.inputs)
        second = self.start(self.second, self.between())
        self.step(first | second, self.inputs, self.first, self.second, iters=self.recipe.iters)

    def and_at_once(self, size: float) -> None:
        """Tune one after the other, then both with steps `size` times as long."""
        layers = self.in_turn(self.recipe.iters)
        self.step(layers, self.inputs, self.first, self.second, iters=self.recipe.iters, size=size)

    def loss(self) -> float:
        """Behind the second block, on the other samples."""
        judged = Activations.of(self.inputs, self.second.targets, None)
        task = self.task(self.first, self.second, rows=torch.arange(len(self.inputs)))
        return evaluate(task, judged, torch.arange(POOL, POOL + OTHERS), BATCH, CPU)


WAYS: dict[str, Callable[[Pair], object]] = {
    IN_TURN: lambda pair: pair.in_turn(pair.recipe.iters),
    AT_ONCE: Pair.at_once,
    AND_AT_ONCE: lambda pair: pair.and_at_once(1.0),
    AND_SHORT: lambda pair: pair.and_at_once(0.25),
    TWICE: lambda pair: pair.in_turn(2 * pair.recipe.iters),
}


def main() -> None:
    """Measure; print a table and write what was asked for."""
    arguments = parser(__doc__)
    arguments.add_argument("--pairs", required=True)
    options = arguments.parse_args()
    scheme, firsts = Scheme.parse(options.scheme), [int(part) for part in options.pairs.split(",")]
    skeleton, names = open_model(options.model)
    tokens, recipe = given_text(options), recipe_of(options)
    losses: dict[str, dict[str, dict[str, float]]] = {}
    for seed in range(options.seeds):
        rows = drawn(seed, options.samples)
        previous: tuple[Part, Tensor] | None = None
        for loaded in walk_to(skeleton, names[: max(firsts) + 2], tokens):
            part, inputs, index = Part.of(loaded), loaded.inputs.clone(), loaded.index - 1
            if previous is not None and index in firsts:
                first, before = previous
                skeleton.load(first.loaded.module, first.loaded.name, torch.float32, CPU)
                pair = Pair(first, part, before, rows, scheme, recipe, seed)
                for name, tune in WAYS.items():
                    tune(pair)
                    found = losses.setdefault(str(index), {}).setdefault(str(seed), {})
                    found[name] = pair.loss()
                    print(f"{seed=}, blocks {index}, {loaded.index}, {name}: {found[name]:.5g}", flush=True)
                skeleton.free(first.loaded.module, first.loaded.name)
            alone = Pair(part, part, inputs, rows, scheme, recipe, seed)
            alone.step(alone.start(part, inputs), inputs, part, iters=recipe.iters)
            previous = part, inputs
    print(f"\n| {options.scheme}, {options.iters} steps | {' | '.join(f'blocks {n}, {n + 1}' for n in firsts)} |")
    print("| --- " * (len(firsts) + 1) + "|")
    for name in WAYS:
        cells = (", ".join(f"{one[name] / one[IN_TURN]:.3f}" for one in losses[str(n)].values()) for n in firsts)
        print(f"| {name} | {' | '.join(cells)} |")
    keep(options, scheme, {"losses": losses})


if __name__ == "__main__":
    main()
