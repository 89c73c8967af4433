"""What the benchmarks of single blocks share: their arguments, the walk to a block, its task and its start."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
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
from auto_round.tune import block as tuner
from auto_round.tune.block import STATE_BYTES, Activations, BlockTask
from auto_round.tune.starting import Layer

CPU = torch.device("cpu")
POOL, OTHERS = 48, 16  # samples of which a seed draws some, and samples that none is tuned on
BATCH = 4

Layers = dict[str, Layer]


def parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments that all of them have."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("model", type=Path)
    made.add_argument("calibration", type=Path)
    made.add_argument("--scheme", required=True)
    made.add_argument("--iters", type=int, default=20)
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--samples", type=int, default=32, help="that a block is tuned on")
    made.add_argument("--seqlen", type=int, default=512)
    made.add_argument("--out", type=Path)
    return made


def recipe_of(options: argparse.Namespace) -> Recipe:
    """The usual one, of this size."""
    return Recipe(iters=options.iters, nsamples=options.samples, seqlen=options.seqlen, batch_size=BATCH)


def given_text(options: argparse.Namespace) -> Tensor:
    """Token ids (POOL + OTHERS, tokens), those that none is tuned on last."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    return torch.tensor(calibration(options.calibration, tokenizer, POOL + OTHERS, options.seqlen))


def drawn(seed: int, samples: int) -> Tensor:
    """The samples, of POOL that there are, which a seed tunes on."""
    return torch.randperm(POOL, generator=generator_for(seed, "samples"))[:samples]


def open_model(folder: Path) -> tuple[Skeleton, list[str]]:
    """The model and the names of its blocks."""
    skeleton = Skeleton(AutoConfig.from_pretrained(folder), Checkpoint(folder))
    return skeleton, block_names(skeleton.model, find_block_lists(skeleton.model))


def walk_to(skeleton: Skeleton, names: Sequence[str], tokens: Tensor) -> Iterator[LoadedBlock]:
    """Block after block in float32, the quantised chain beside the original's."""
    return walk(skeleton, names, tokens, Walk(BATCH, quantised_inputs=True, device=CPU, dtype=torch.float32, store=CPU))


def exact_weights(loaded: LoadedBlock) -> dict[str, Tensor]:
    """Copies of the Linears' weights, which tuning writes over."""
    return {name: linear.weight.detach().clone() for name, linear in loaded.linears.items()}


def start(task: BlockTask, activations: Activations, recipe: Recipe) -> Layers:
    """The layers where tuning starts, their weights written."""
    room = STATE_BYTES * sum(weight.numel() for weight in task.weights.values())
    layers, _ = tuner._start_layers(task, activations, recipe, CPU, room)
    tuner._write(task, layers)
    return layers


def steps(
    task: BlockTask, layers: Layers, activations: Activations, recipe: Recipe, generator: torch.Generator
) -> Iterator[int]:
    """Move the layers on all samples; yield how many steps are done after each."""
    every = torch.arange(len(activations.inputs))
    return tuner._steps(task, layers, activations, recipe, every, generator, CPU, lambda *_: None)


def keep(options: argparse.Namespace, scheme: Scheme, figures: dict[str, Any]) -> None:
    """Write the figures, if that was asked for, with what they are of."""
    if options.out:
        job = {"model": options.model.name, "scheme": scheme.name, "iters": options.iters}
        rest = {"samples": options.samples, "seqlen": options.seqlen, "machine": machine()}
        options.out.write_text(json.dumps({**job, **rest, **figures}, indent=1) + "\n", encoding="utf-8")
