"""Calibration text that the original model writes itself; what a killed run has written is not lost."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from auto_round.calibrate.pairs import is_pairs
from auto_round.calibrate.selftext import Beginnings, joined, out_of_nothing, pieces, write
from auto_round.errors import SpecError
from auto_round.pipeline.job import Prepared, Ready
from auto_round.pipeline.needs import IN_PLACE, heed, needs, own_texts, shortage, too_much, writing_bytes
from auto_round.runtime.device import release_cached
from auto_round.runtime.durable import GO_ON, disk_errors
from auto_round.runtime.events import Listener
from auto_round.runtime.journal import Journal
from auto_round.source.foreign import foreign


def check(prepared: Prepared) -> None:
    """Raise SpecError when the model is to write samples and cannot."""
    job = prepared.job
    if job.recipe.self_nsamples and is_pairs(job.dataset):
        raise SpecError("self_nsamples goes with text: the model cannot go on from image-text pairs by itself")
    asked = "self_nsamples" if job.recipe.self_nsamples else "the set self"
    if own_texts(job, job.recipe.seqlen) and prepared.source.tokenizer is None:
        raise SpecError(f"{asked} needs a tokenizer, which says what tokens are text; the model has none")


def written(ready: Ready, folder: Path, listener: Listener) -> Ready:
    """The same with what the model writes: its blank samples out of nothing, then the recipe's `self_nsamples` behind
    those of the blocks. folder: see `_written`.
    """
    prepared, data = ready.prepared, ready.calibration
    if data is None:
        return ready
    recipe, seqlen = prepared.job.recipe, data.tokens.shape[1]
    with foreign(f"{prepared.source.folder}: the model cannot write text"):
        if blank := int(data.blank.sum()):
            begin = out_of_nothing(_tokenizer(prepared), blank, seqlen, recipe.seed)
            data = data.filled(_written(prepared, begin, seqlen, folder, listener))
        if recipe.self_nsamples:
            blocks = data.first(recipe.nsamples)
            begin = pieces(_tokenizer(prepared), blocks, recipe.self_nsamples, recipe.seed)
            texts = _written(prepared, begin, seqlen, folder, listener)
            data = data.inserted(len(blocks.tokens), joined(texts, seqlen), "the model's own")
    samples, length = data.tokens.shape
    listener.note(f"calibration: {samples} samples of {length} tokens from {data.source}")
    return replace(ready, calibration=data)


def _written(prepared: Prepared, begin: Beginnings, seqlen: int, folder: Path, listener: Listener) -> Tensor:
    """What the original model makes of `begin`, (texts, length) token ids; it is in memory only meanwhile.

    seqlen: of the samples they are for. folder: where finished texts are kept, by all that decides them, so that none
    is written a second time. Raises SpecError when the memory that was allowed cannot suffice, here or for tuning.
    """
    job = prepared.job
    with disk_errors(folder, GO_ON):
        kept = Journal(folder)
    # Where it is measured, another start may find another dtype faster; texts of either are the model's own.
    facts = {**prepared.original, **({"compute_dtype": "measured"} if job.dtype_measured else {})}
    title = hashlib.sha256(json.dumps([facts, begin.digest]).encode()).hexdigest()
    found = kept.kept(title)
    known = None if found is None else found[0]["tokens"]
    count, length = len(begin.tokens), begin.length
    if known is not None:
        listener.note(f"{len(known)} of {count} texts that the model wrote before are used again")
        if len(known) == count:
            return known
    _check_memory(prepared, count, length, seqlen, listener)
    listener.note(f"the model writes {count} texts of {length} tokens itself; it is in memory whole for this")
    finished = 0 if known is None else len(known)

    def told(done: int, total: int, texts: Tensor) -> None:
        nonlocal finished
        listener.writing(done, total)
        if len(texts) > finished:
            finished = len(texts)
            with disk_errors(folder, GO_ON):
                kept.keep(title, {"tokens": texts}, {})

    opener = prepared.skeleton.auto_class
    model = opener.from_pretrained(prepared.source.folder, dtype=job.dtype, trust_remote_code=job.trust_remote_code).to(
        job.device
    )
    tokens = write(model, begin, known, told)
    del model
    release_cached(job.device)
    return tokens


def _check_memory(prepared: Prepared, texts: int, length: int, seqlen: int, listener: Listener) -> None:
    """Refuse what `max_memory` cannot hold while the model writes, or afterwards; hours of writing lie between."""
    job = prepared.job
    host, _ = writing_bytes(prepared, texts, length)
    heed(shortage("writing", host, job, IN_PLACE), job, listener)
    later = too_much(needs(prepared, job.recipe.block_samples, seqlen), job)
    if later and job.max_memory:
        raise SpecError(later)


def _tokenizer(prepared: Prepared) -> PreTrainedTokenizerBase:
    tokenizer = prepared.source.tokenizer
    assert tokenizer is not None  # see `check`
    return tokenizer
