"""The end gate: what was made is run beside the original on a few samples before it is called done.

Twice: block by block from the codes (any size fits, and the errors of single blocks show), and, where memory allows,
through transformers from the written folder, as a user would open it.
"""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from auto_round.calibrate.capture import NoLogitsError, logits_of
from auto_round.calibrate.front import Walk, behind_blocks
from auto_round.calibrate.walker import walk
from auto_round.errors import CheckError, SourceError, SpecError
from auto_round.evaluate.metrics import Tally, evaluate_tokens, greedy, held_out_text, tally
from auto_round.pipeline.job import Prepared, Quantised
from auto_round.pipeline.needs import budget_bytes, checking_bytes, opening_bytes
from auto_round.runtime.device import release_cached
from auto_round.runtime.events import Listener
from auto_round.source.foreign import foreign

SAMPLES = 2  # of the calibration set, and as many of text it does not have
SEQLEN = 128  # tokens
SENTENCE_TOKENS = 16
PROMPT = "The most important thing to know about"
DIGITS = 4  # significant ones in the record: the last bits of a sum may differ from machine to machine
BLAMED = 3  # blocks named when a result is bad


@dataclass(frozen=True)
class Finding:
    """How near one way of running the result is to the original.

    opened: "block by block", or the format whose folder transformers opened. kl_divergence: mean, in nats.
    perplexity_ratio: that of the result over the original's. top1_agreement: 0 .. 1. sentence: what the model goes on
    with after PROMPT; empty block by block.
    """

    opened: str
    kl_divergence: float
    perplexity_ratio: float
    top1_agreement: float
    sentence: str = ""


@dataclass(frozen=True)
class Verdict:
    """All findings, each block's relative error (0 .. 1), why a part was left out, and what could not be opened."""

    findings: tuple[Finding, ...]
    block_errors: tuple[float, ...]
    notes: tuple[str, ...]
    faults: tuple[str, ...]

    def summary(self) -> dict[str, Any]:
        """What the record keeps."""
        words = {"notes": list(self.notes), "faults": list(self.faults)}
        return {"findings": [asdict(finding) for finding in self.findings], **words}


def check(result: Quantised, folders: Sequence[tuple[str, Path]], listener: Listener) -> Verdict | None:
    """Run the result beside the original. folders: (format, where it was written). None when there is no text to
    run, or too little memory.

    Memory: as tuning for the first part; the whole quantised model for the second, which is left out if it is larger
    than what is available.
    """
    tokens = _samples(result)
    if tokens is None:
        listener.note("not compared with the original: neither calibration samples nor a tokenizer for other text")
        return None
    needed, budget = checking_bytes(result.prepared, tokens.numel()), budget_bytes(result.job)
    if needed > budget:
        listener.note(
            f"not compared with the original: that needs about {needed / 1e9:.1f} GB, {budget / 1e9:.1f} GB may be used"
        )
        return None
    try:
        reference, total, errors = _block_by_block(result, tokens)
    except NoLogitsError as error:
        listener.note(f"not compared with the original: {error}")
        return None
    findings = [_finding("block by block", total)]
    notes, faults = [], []
    for name, folder in folders:
        reason = _why_not_opened(folder, opening_bytes(result.prepared, tokens.numel()), budget)
        try:
            found = None if reason else _opened(name, folder, result, tokens, reference)
        except SourceError as error:
            # Paths differ from run to run, and the folder will be elsewhere.
            faults.append(str(error).replace(str(folder), "the folder"))
            continue
        if found is None:
            reason = reason or f"it needs more memory than {result.job.device} has"
            notes.append(f"{name}: not opened through transformers: {reason}")
        else:
            findings.append(found)
    for note in notes:
        listener.note(note)
    for finding in findings:
        listener.note(_line(finding))
    return Verdict(tuple(findings), tuple(errors), tuple(notes), tuple(faults))


@dataclass(frozen=True)
class Checked:
    """What `check` will run: tokens in all, whether through transformers too, and the peak bytes of it."""

    positions: int
    opened: bool
    peak_bytes: int


def foreseen(prepared: Prepared, samples: int, seqlen: int) -> Checked | None:
    """What `check` will do, without parts that will be left out for lack of memory; None if all will be.

    samples, seqlen: of the calibration set, 0 samples when there is none.
    """
    other = SAMPLES if prepared.source.tokenizer is not None else 0
    positions = (min(SAMPLES, samples) + other) * (min(SEQLEN, seqlen) if samples else SEQLEN)
    codes, opened = checking_bytes(prepared, positions), opening_bytes(prepared, positions)
    budget = budget_bytes(prepared.job)
    if not positions or codes > budget:
        return None
    return Checked(positions, opened <= budget, max(codes, opened) if opened <= budget else codes)


def judge(verdict: Verdict, largest: float, blocks: Sequence[str], folder: Path) -> None:
    """Raise CheckError when a finding is worse than `largest` nats of KL divergence, naming the `blocks` to blame."""
    if verdict.faults:
        raise CheckError(
            f"{folder}: was written, but {verdict.faults[0]}\nThe folder stays. --disable_check skips this."
        )
    bad = [f for f in verdict.findings if not f.kl_divergence <= largest]
    if not bad:
        return
    lines = [_line(finding) for finding in bad]
    if bad[0].opened != "block by block":
        lines.append("Its codes alone are within the bound: the fault is in how the folder is read or computed with.")
    else:
        order = sorted(range(len(blocks)), key=lambda i: -_added(verdict.block_errors, i))
        blame = ", ".join(f"{blocks[i]} (+{_added(verdict.block_errors, i):.1%})" for i in order[:BLAMED])
        if blame:
            lines.append(f"Blocks that add most to the relative error: {blame}.")
        lines.append("Give them more bits by layer_config, or tune longer; more bits or smaller groups help most.")
    raise CheckError(
        f"{folder}: was written, but is further from the original than {largest} nats of KL divergence\n"
        + "\n".join(lines)
        + "\nThe folder stays. --max_kl sets the bound, --disable_check turns this off."
    )


def judge_record(record: Mapping[str, Any] | None, largest: float, folder: Path, listener: Listener) -> None:
    """`judge` a finished output by what `Verdict.summary` kept of it; None, when it was not compared, is told."""
    if record is None:
        listener.note(f"{folder}: was not compared with the original when it was made; --overwrite does it again")
        return
    kept: list[dict[str, Any]] = [
        {key: math.nan if value is None else value for key, value in row.items()} for row in record["findings"]
    ]
    judge(Verdict(tuple(Finding(**row) for row in kept), (), (), tuple(record["faults"])), largest, (), folder)


def _added(errors: Sequence[float], index: int) -> float:
    """The relative error a block adds to what it was given; not a number counts as all of it."""
    before = errors[index - 1] if index else 0.0
    added = errors[index] - before
    return added if math.isfinite(added) else math.inf


def _line(finding: Finding) -> str:
    said = f'; goes on: "{PROMPT}{finding.sentence}"' if finding.sentence else ""
    return (
        f"{finding.opened}: KL divergence {finding.kl_divergence:.3g} nats, perplexity x {finding.perplexity_ratio:.3g}"
        f", same likeliest token {finding.top1_agreement:.0%}{said}"
    )


def _samples(result: Quantised) -> Tensor | None:
    """(n, tokens) int64 of calibration and of other text, all of one length and inside the vocabulary."""
    rows: list[Tensor] = []
    seqlen = SEQLEN
    if result.calibration is not None and not result.calibration.beside:  # pairs cannot be cut, nor run without images
        seqlen = min(seqlen, result.calibration.tokens.shape[1])
        whole = result.calibration.mask[:, :seqlen].all(dim=1)
        rows += list(result.calibration.tokens[whole, :seqlen][:SAMPLES])
    tokenizer = result.source.tokenizer
    if tokenizer is not None:
        limit = getattr(result.source.config.get_text_config(), "max_position_embeddings", None) or seqlen
        seqlen = min(seqlen, limit)
        rows = [row[:seqlen] for row in rows]
        # A tokenizer that makes few tokens of a page, or fails: calibration samples are enough.
        with suppress(SpecError, SourceError), foreign("the tokenizer fails"):
            rows += list(evaluate_tokens(tokenizer, held_out_text(), seqlen, SAMPLES))
    vocabulary = result.prepared.skeleton.model.get_input_embeddings().weight.shape[0]
    rows = [row for row in rows if int(row.max()) < vocabulary]
    return torch.stack(rows) if rows and seqlen > 1 else None


def _block_by_block(result: Quantised, tokens: Tensor) -> tuple[list[Tensor], Tally, list[float]]:
    """Logits (tokens - 1, vocabulary) of the original for each sample, the result's distance, each block's relative
    error. Raises NoLogitsError."""
    prepared, job = result.prepared, result.job
    settings = Walk(
        batch_size=len(tokens),
        quantised_inputs=True,
        device=job.device,
        dtype=job.dtype,
        store=job.device,
        compile=False,
    )
    errors: list[float] = []
    original = quantised = None
    for loaded in walk(prepared.skeleton, prepared.blocks, tokens, settings):
        if original is not None and quantised is not None:
            errors.append(_relative_error(quantised, original))
        for name, linear in loaded.linears.items():
            if name in prepared.plan.quantised:
                linear.weight.data.copy_(result.tensor(name).dequantize())
        original, quantised = loaded.targets.clone(), loaded.inputs
    assert original is not None
    assert quantised is not None
    errors.append(_relative_error(quantised, original))
    with behind_blocks(prepared.skeleton, prepared.blocks, job.dtype, job.device):
        reference = list(_logits(prepared, tokens, original))
        head = prepared.skeleton.model.get_output_embeddings()
        for name in prepared.outside:
            if prepared.skeleton.model.get_submodule(name) is head:
                # Not in place: a tied embedding's weight is the same memory.
                head.weight.data = result.tensor(name).dequantize().to(head.weight)
        found = _distance(reference, _logits(prepared, tokens, quantised), tokens)
    return reference, found, errors


def _opened(name: str, folder: Path, result: Quantised, tokens: Tensor, reference: list[Tensor]) -> Finding | None:
    """Open a folder as users do, and compare; None when the device is too small for it, which says nothing against it.

    Raises SourceError when it cannot be used.
    """
    with foreign(f"{name}: the written folder cannot be used"):
        try:
            return _through_transformers(name, folder, result, tokens, reference)
        except torch.OutOfMemoryError:
            return None


def _through_transformers(
    name: str, folder: Path, result: Quantised, tokens: Tensor, reference: list[Tensor]
) -> Finding:
    job, tokenizer = result.job, result.source.tokenizer
    model = result.prepared.skeleton.auto_class.from_pretrained(
        folder, dtype=job.dtype, device_map=str(job.device), trust_remote_code=job.trust_remote_code
    )
    with torch.no_grad():
        rows = (model(input_ids=row[None].to(job.device), use_cache=False).logits[0, :-1] for row in tokens)
        found = _finding(name, _distance(reference, rows, tokens))
    sentence = greedy(model, tokenizer, PROMPT, SENTENCE_TOKENS) if tokenizer is not None else ""
    del model, rows  # the generator holds the model
    gc.collect()  # a model's modules refer to each other
    release_cached(job.device)
    return replace(found, sentence=sentence)


def _why_not_opened(folder: Path, needed: int, budget: int) -> str | None:
    """Why transformers is not asked to open a folder, or None."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"quantization_config": {}}
    if config.get("quantization_config", {"quant_method": "auto-round"}).get("quant_method") != "auto-round":
        return "its reader is another package's; every layer was read back here"
    if needed > budget:
        return f"it needs about {needed / 1e9:.1f} GB of memory, {budget / 1e9:.1f} GB may be used"
    return None


def _logits(prepared: Prepared, tokens: Tensor, hidden: Tensor) -> Iterator[Tensor]:
    """What the original model makes of the last block's output, sample by sample: (tokens - 1, vocabulary)."""
    device = prepared.job.device
    for i in range(len(tokens)):
        ids, states = tokens[i : i + 1].to(device), hidden[i : i + 1].to(device)
        with torch.no_grad():
            logits = logits_of(prepared.skeleton.model, prepared.blocks, ids, states)
        yield logits[0, :-1]


def _distance(reference: Sequence[Tensor], logits: Iterator[Tensor], tokens: Tensor) -> Tally:
    """Add up all samples; the logits of one are alive beside the reference's."""
    total = Tally()
    for expected, found, row in zip(reference, logits, tokens, strict=True):
        total += tally(expected, found, row[1:])
    return total


def _relative_error(found: Tensor, expected: Tensor) -> float:
    """|found - expected|^2 / |expected|^2."""
    difference = (found.float() - expected.float()).square().flatten(1).sum(1)
    size = expected.float().square().flatten(1).sum(1)
    return float(difference.cpu().double().sum() / size.cpu().double().sum())  # not every device has float64


def _finding(opened: str, total: Tally) -> Finding:
    ratio = math.exp(min((total.nll - total.reference_nll) / total.positions, 700.0))
    agreement = total.agreements / total.positions
    return Finding(opened, _rounded(total.kl / total.positions), _rounded(ratio), _rounded(agreement))


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
