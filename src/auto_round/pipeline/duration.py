"""How long a run will take, part by part: what it does, counted from shapes, times how fast this machine does it."""

from __future__ import annotations

import math
from collections.abc import Mapping

from auto_round.calibrate.divergence import SHARE
from auto_round.calibrate.selftext import at_a_time
from auto_round.pipeline.finishing import CHECKS, HELD
from auto_round.pipeline.gate import SENTENCE_TOKENS, Checked
from auto_round.pipeline.job import Prepared
from auto_round.pipeline.needs import Sizes, all_sizes, own_texts
from auto_round.pipeline.timing import ATTENTION_SHARE, Rates
from auto_round.spec.recipe import Recipe
from auto_round.tune.moments import ENOUGH

LOSSES = 5  # passes over the held-out samples in one block: plain, start, and the candidates
CHAINS = 2  # the original's activations and the quantised model's


def seconds(
    prepared: Prepared, rates: Rates, samples: int, seqlen: int, outputs: int, checked: Checked | None
) -> Mapping[str, float]:
    """Seconds by part. outputs: bytes of all folders; checked: what the end gate will run, None when it will not."""
    weights = sum(layer.out_features * layer.in_features for layer in prepared.plan.quantised.values())
    source = prepared.skeleton.checkpoint.nbytes
    keeping = weights * rates.kept
    # A tensor that is copied is read from the source, and what is written is read back to be proved.
    copied = sum(e.nbytes for n, e in prepared.source.checkpoint.entries.items() if n not in _replaced(prepared))
    found = {"saving": weights * rates.packed + outputs * (rates.written + rates.read) + copied * rates.source}
    if checked is not None:
        found["checking"] = _checking(prepared, rates, checked, weights, source, outputs)
    if not samples:
        return {"rounding": weights * (rates.examined + rates.rounded) + source * rates.source + keeping, **found}
    passes, starts, steps = (
        sum(part)
        for part in zip(*(_block(prepared, s, rates, samples, seqlen) for s in all_sizes(prepared)), strict=True)
    )
    steps += _judging(prepared, rates, samples, seqlen)
    # Every weight is read to be examined, then with its block.
    reading = weights * rates.examined + source * (rates.source + rates.read)
    if writing := sum(_writing(prepared, rates, *texts) for texts in own_texts(prepared.job, seqlen)):
        found["writing"] = writing
    if prepared.job.recipe.finish_iters:
        found["finishing"] = _finishing(prepared, rates, samples, seqlen, weights)
    return {"passes": passes + reading, "starts": starts, "steps": steps, "keeping": keeping, **found}


def _held(recipe: Recipe, samples: int) -> int:
    """Samples on which a block is judged."""
    return max(1, round(recipe.heldout * samples)) if recipe.heldout else samples


def _replaced(prepared: Prepared) -> set[str]:
    return {prepared.stored_names[name] for name in prepared.plan.quantised if name in prepared.stored_names}


def _block(prepared: Prepared, sizes: Sizes, rates: Rates, samples: int, seqlen: int) -> tuple[float, float, float]:
    """Seconds of one block's (forward passes, start, steps)."""
    recipe = prepared.job.recipe
    hidden: int = prepared.skeleton.model.get_input_embeddings().weight.shape[1]
    per_step, held = recipe.per_step(samples), _held(recipe, samples)
    searching = recipe.start != "plain"
    widest = max((shared.inputs for shared in sizes.shared), default=0)
    routed = sizes.multiplied < sizes.parameters  # few tokens come to an expert
    given = samples - recipe.self_nsamples
    observed = samples if routed else min(samples, max(given, math.ceil(ENOUGH * widest / seqlen)))
    products = rates.forward * (sizes.multiplied + ATTENTION_SHARE * 2 * seqlen * hidden)  # of one token
    once, step = products + rates.around * sizes.features, 3 * products + rates.around_step * sizes.features
    passes = seqlen * once * (CHAINS * samples + searching * observed + LOSSES * held)
    steps = recipe.iters * (per_step * seqlen * step + sizes.weights * rates.sweep)
    starts = sizes.weights * rates.searched
    if searching:
        starts += rates.forward * seqlen * observed * sum(shared.inputs**2 for shared in sizes.shared)
    if recipe.start == "compensated":
        starts += sizes.weights * rates.ordered
        for shared in sizes.shared:
            starts += rates.factored * shared.inputs**3 + rates.forward * shared.inputs * sum(shared.weights) / 2
    return passes, starts, steps


def _judging(prepared: Prepared, rates: Rates, samples: int, seqlen: int) -> float:
    """The head in the last block's loss: of the original, of the quantised block, and backwards, for a part of the
    tokens in steps and for all of those held out."""
    recipe = prepared.job.recipe
    head: int = prepared.skeleton.model.get_input_embeddings().weight.numel()
    if not prepared.last_by_tokens:
        return 0.0
    per_step, held = recipe.per_step(samples), _held(recipe, samples)
    return head * seqlen * rates.forward * (3 * SHARE * recipe.iters * per_step + 2 * LOSSES * held)


def _writing(prepared: Prepared, rates: Rates, texts: int, written: int, length: int) -> float:
    """The model's own texts: every token through all weights, which are read once for those written together."""
    parameters: int = sum(p.numel() for p in prepared.skeleton.model.parameters())
    return written * parameters * (texts * rates.forward + math.ceil(texts / at_a_time(length)) * rates.lone)


def _finishing(prepared: Prepared, rates: Rates, samples: int, seqlen: int, weights: int) -> float:
    """The original once on all samples; in each step all blocks forwards and backwards, each weight from its codes."""
    recipe = prepared.job.recipe
    parameters: int = sum(p.numel() for p in prepared.skeleton.model.parameters())
    features = sum(sizes.features for sizes in all_sizes(prepared))
    token = 4 * parameters * rates.forward + features * (rates.around + rates.around_step)
    tried = CHECKS * max(1, round(HELD * recipe.samples)) * seqlen * parameters * rates.forward
    step = recipe.per_step(samples) * seqlen * token + 3 * weights * rates.restored
    return recipe.samples * seqlen * parameters * rates.forward + tried + recipe.finish_iters * step


def _checking(prepared: Prepared, rates: Rates, checked: Checked, weights: int, source: int, outputs: int) -> float:
    """Both chains through all blocks from the codes; then, if it will be opened, the whole model and a sentence."""
    parameters: int = sum(p.numel() for p in prepared.skeleton.model.parameters())
    found = CHAINS * checked.positions * parameters * rates.forward + weights * rates.restored + source * rates.read
    if checked.opened:
        found += outputs * rates.read + weights * rates.packed
        found += checked.positions * parameters * rates.forward + SENTENCE_TOKENS * parameters * rates.lone
    return found
