"""`quantise`: the whole run, from what the user names to codes in the journal."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from auto_round.calibrate.dataset import CalibrationSet, build_calibration
from auto_round.calibrate.selftext import sample_tokens
from auto_round.errors import SpecError
from auto_round.formats.base import Format
from auto_round.pipeline.job import Job, Prepared, Quantised
from auto_round.pipeline.preparing import prepare, tell_plan
from auto_round.pipeline.runner import Runner
from auto_round.runtime.events import Listener
from auto_round.runtime.journal import Journal


def quantise(job: Job, formats: Sequence[Format], scratch: Path, listener: Listener) -> Quantised:
    """Run the whole tuning; codes end in a journal below `scratch`.

    formats: those the result is meant for; a layer that one of them cannot hold is kept. Raises AutoRoundError of the
    right kind, before any tuning wherever the fault can be seen by then.
    """
    begin = time.perf_counter()
    torch.manual_seed(job.recipe.seed)  # some models draw in their forward; nothing of ours reads the global generator
    prepared = prepare(job, formats, scratch)
    tell_plan(prepared.plan, listener)
    journal = Journal(scratch / "blocks")
    runner = Runner(prepared, journal, listener)
    # Plain round-to-nearest needs no activations at all.
    calibration = calibrate(prepared, listener) if job.recipe.iters or job.recipe.start != "plain" else None
    blocks = runner.round_alone() if calibration is None else runner.tune(calibration)
    return Quantised(prepared, journal, calibration, tuple(blocks), time.perf_counter() - begin)


def calibrate(prepared: Prepared, listener: Listener) -> CalibrationSet:
    """Build the samples to tune on; raise CalibrationError, or SpecError when they do not fit the model."""
    job, source = prepared.job, prepared.source
    recipe = job.recipe
    limit = getattr(source.config.get_text_config(), "max_position_embeddings", None)  # not every architecture has one
    seqlen = recipe.seqlen
    if isinstance(limit, int) and 0 < limit < seqlen:
        listener.warn(f"samples are cut to {limit} tokens, the longest this model takes (seqlen was {seqlen})")
        seqlen = limit

    def sampler(count: int, length: int, seed: int) -> Tensor:
        listener.note(f"the model samples {count} texts of {length} tokens itself; it is in memory whole for this")
        model = AutoModelForCausalLM.from_pretrained(
            source.folder, dtype=job.dtype, trust_remote_code=job.trust_remote_code
        ).to(job.device)
        return sample_tokens(model, source.tokenizer, count, length, seed, job.recipe.batch_size)

    calibration = build_calibration(
        job.dataset,
        source.tokenizer,
        nsamples=recipe.nsamples,
        seqlen=seqlen,
        seed=recipe.seed,
        listener=listener,
        sampler=sampler,
    )
    vocabulary = prepared.skeleton.model.get_input_embeddings().weight.shape[0]
    largest = int(calibration.tokens.max())
    if largest >= vocabulary:
        raise SpecError(f"calibration holds token id {largest}, but the model's vocabulary ends at {vocabulary - 1}")
    samples, length = calibration.tokens.shape
    listener.note(f"calibration: {samples} samples of {length} tokens from {calibration.source}")
    return calibration
