"""The whole run, from what the user names to codes in the journal."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from auto_round.calibrate.corpora import set_behind_auto
from auto_round.calibrate.dataset import CalibrationSet, build_calibration
from auto_round.calibrate.pairs import from_pairs, is_pairs
from auto_round.errors import SourceError, SpecError
from auto_round.formats.base import Format
from auto_round.pipeline.finishing import FINISHED, finish
from auto_round.pipeline.forecast import forecast
from auto_round.pipeline.gate import judge_record
from auto_round.pipeline.inspection import inspect
from auto_round.pipeline.job import Job, Prepared, Quantised, Ready, Saving
from auto_round.pipeline.needs import Needs, device_shortage, heed, needs, too_much
from auto_round.pipeline.planning import tell_plan
from auto_round.pipeline.preparing import prepare
from auto_round.pipeline.publishing import check_space, kept_all, made_with, publish, published
from auto_round.pipeline.runner import Runner
from auto_round.pipeline.signature import signature
from auto_round.pipeline.writing import check, written
from auto_round.report.forecast import Forecast
from auto_round.report.record import RunReport
from auto_round.runtime.device import compute_dtype
from auto_round.runtime.events import Listener
from auto_round.runtime.journal import Journal
from auto_round.runtime.workspace import ACTIVATIONS, WRITTEN, Workspace, check_free
from auto_round.source.foreign import foreign
from auto_round.source.opening import Source, processor_of


def make_ready(job: Job, formats: Sequence[Format], scratch: Path, listener: Listener) -> Ready:
    """Everything that comes before the work: open, plan, calibrate, sign, and have the model write its own text.

    formats: those the result is meant for; a layer that one of them cannot hold is kept. scratch: where a model that is
    not a folder of safetensors is unpacked. Raises AutoRoundError of the right kind for whatever can be seen by now.
    """
    return written(_signed(_opened(job, formats, scratch, listener), listener), scratch / WRITTEN, listener)


def _opened(job: Job, formats: Sequence[Format], scratch: Path, listener: Listener) -> Prepared:
    torch.manual_seed(job.recipe.seed)  # some models draw in their forward; nothing of ours reads the global generator
    prepared = prepare(job, formats, scratch)
    tell_plan(prepared.plan, prepared.skeleton, listener)
    if job.recipe.calibrated:
        inspect(prepared, listener)
    return prepared


def _signed(prepared: Prepared, listener: Listener) -> Ready:
    """Calibrated, but for what the model is to write: all that decides that is known before it is written."""
    data = calibrate(prepared, listener) if prepared.job.recipe.calibrated else None
    return Ready(prepared, data, signature(prepared, data))


def quantise(ready: Ready, journal: Journal, scratch: Path, listener: Listener) -> Quantised:
    """Choose the codes of every layer; those that `journal` has stay.

    scratch: a folder for activations that do not fit memory. Raises AutoRoundError naming the layer, or SpecError when
    the memory that was allowed cannot suffice.
    """
    begin = time.perf_counter()
    job, data = ready.prepared.job, ready.calibration
    wanted = _needs_of(ready)
    heed(too_much(wanted, job), job, listener)
    if sentence := device_shortage(wanted, job):
        listener.warn(sentence)
    if wanted.on_disk or wanted.on_host or wanted.samples_per_forward < job.recipe.batch_size:
        place = "on disk" if wanted.on_disk else "in the host's memory" if wanted.on_host else "in memory"
        listener.note(f"activations are kept {place}, {wanted.samples_per_forward} samples go through a block at once")
    runner = Runner(ready.prepared, wanted, journal, scratch, listener)
    if FINISHED in journal and not runner.complete:
        journal.drop(FINISHED)  # a damaged block is tuned anew, on what the blocks' own scales give
    blocks = runner.round_alone() if data is None else runner.tune(data.first(job.recipe.block_samples))
    shutil.rmtree(scratch / ACTIVATIONS, ignore_errors=True)
    if data is not None and job.recipe.finish_iters:
        finish(ready.prepared, journal, data, runner.settings, listener)
        shutil.rmtree(scratch / ACTIVATIONS, ignore_errors=True)
    return Quantised(ready, journal, tuple(blocks), time.perf_counter() - begin)


def _needs_of(ready: Ready) -> Needs:
    data = ready.calibration
    if data is None:
        return needs(ready.prepared, 0, 0)
    samples = data.first(ready.prepared.job.recipe.block_samples).tokens
    return needs(ready.prepared, *samples.shape)


def run(job: Job, saving: Saving, work: Workspace, listener: Listener) -> RunReport:
    """Do the job in a workspace, from wherever an earlier start of it stopped, and put the output in its place.

    Raises OutputError when the target or the workspace holds another job's work that may not be overwritten, and
    CheckError when the result, which may be an earlier run's, is too far from the original.
    """
    begun = work.recorded() or (None if saving.overwrite else made_with(work.target))
    prepared = _opened(job if begun is None else _as_begun(job, begun, listener), saving.formats, work.folder, listener)
    ready = _signed(prepared, listener)
    done = None if saving.overwrite else published(work.target, ready, saving.formats)
    if done is not None:
        listener.note("nothing to do: this very job has been done already")
        work.forget(ready.facts)
        if saving.max_kl is not None:
            judge_record(done.check, saving.max_kl, work.target, listener)
        return done
    check_free(work.target, overwrite=saving.overwrite)
    if not saving.overwrite:
        work.check(ready.facts)
    shutil.rmtree(work.folder / ACTIVATIONS, ignore_errors=True)  # of a run that was killed
    wanted = _needs_of(ready)
    tuned = work.is_of(ready.facts) and kept_all(prepared, work)
    check_space(prepared, saving, work, wanted.activation_bytes if wanted.on_disk and not tuned else 0)
    ready = written(ready, work.folder / WRITTEN, listener)
    work.claim(ready.facts, overwrite=saving.overwrite)
    journal = Journal(work.blocks)
    try:
        return publish(quantise(ready, journal, work.folder, listener), saving, work, listener)
    except SourceError:  # what was made of a damaged model is worth nothing
        work.discard()
        raise
    except KeyboardInterrupt:
        if len(journal):
            listener.warn(f"{len(journal)} finished blocks are kept; the same command goes on from there")
        raise


def _as_begun(job: Job, begun: Mapping[str, Any], listener: Listener) -> Job:
    """The job with the dtype and the set of text in which its work was begun: found anew they might be others.

    begun: facts of the work, or of the finished output, see `made_with`.
    """
    if job.dtype_measured and begun.get("device") == job.device.type:
        job = replace(job, dtype=compute_dtype(begun["compute_dtype"], job.device))
    if job.dataset == "auto" and isinstance(begun.get("calibration"), str):
        job = replace(job, dataset=set_behind_auto(begun["calibration"]))
        if job.dataset != "auto":
            listener.note(f"calibration text: {job.dataset}, with which this was begun; dataset names another")
    return job


def sample_tokens_of(prepared: Prepared) -> int:
    """Tokens of one calibration sample: as many as asked for, or as the model takes."""
    config, seqlen = prepared.source.config.get_text_config(), prepared.job.recipe.seqlen
    limit = getattr(config, "max_position_embeddings", None)  # not every architecture has one
    return min(seqlen, limit) if isinstance(limit, int) and limit > 0 else seqlen


def foresee(job: Job, saving: Saving, target: Path) -> Forecast:
    """The forecast of a run into `target`, which need not be there; nothing is kept. A problem is no error here."""
    with tempfile.TemporaryDirectory(prefix="auto-round-") as scratch:
        begin = time.perf_counter()
        prepared = prepare(job, saving.formats, Path(scratch))
        return forecast(prepared, saving, target, sample_tokens_of(prepared), time.perf_counter() - begin)


def calibrate(prepared: Prepared, listener: Listener) -> CalibrationSet:
    """Build the samples to tune on, blank where the model is to write them.

    Raises CalibrationError, or SpecError when they do not fit the model.
    """
    job, source = prepared.job, prepared.source
    recipe = job.recipe
    check(prepared)
    seqlen = sample_tokens_of(prepared)
    if seqlen < recipe.seqlen:
        listener.warn(f"samples are cut to {seqlen} tokens, the longest this model takes (seqlen was {recipe.seqlen})")

    if is_pairs(job.dataset):
        processor = job.processor or processor_of(source.folder, trust_remote_code=job.trust_remote_code)
        calibration = from_pairs(
            job.dataset, processor, nsamples=recipe.given_samples, seqlen=seqlen, listener=listener
        )
    else:
        calibration = _from_text(job, source, seqlen, listener)
    vocabulary = prepared.skeleton.model.get_input_embeddings().weight.shape[0]
    largest = int(calibration.tokens.max())
    if largest >= vocabulary:
        raise SpecError(f"calibration holds token id {largest}, but the model's vocabulary ends at {vocabulary - 1}")
    return calibration


def _from_text(job: Job, source: Source, seqlen: int, listener: Listener) -> CalibrationSet:
    with foreign(f"{source.folder}: its tokenizer fails on the calibration text"):
        return build_calibration(
            job.dataset,
            source.tokenizer,
            nsamples=job.recipe.given_samples,
            seqlen=seqlen,
            seed=job.recipe.seed,
            listener=listener,
        )
