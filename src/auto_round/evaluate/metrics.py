"""Distances between a model and its original, over the next-token distributions on the same text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from auto_round.errors import SpecError

# float32 log-probabilities alive at once: 16 positions of a vocabulary of 262,144 are 17 MB a copy.
POSITIONS_AT_ONCE = 16


@dataclass(frozen=True)
class Tally:
    """Sums over positions: negative log-likelihoods (nats), KL divergence (nats), agreements of the likeliest token."""

    reference_nll: float = 0.0
    nll: float = 0.0
    kl: float = 0.0
    agreements: int = 0
    positions: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.reference_nll + other.reference_nll,
            self.nll + other.nll,
            self.kl + other.kl,
            self.agreements + other.agreements,
            self.positions + other.positions,
        )


@dataclass(frozen=True)
class Comparison:
    """A model beside its reference.

    perplexity_reference, perplexity: exp of the mean negative log-likelihood. kl_divergence: mean, in nats, of
    KL(reference || model). top1_agreement: share of positions with the same likeliest token, 0 .. 1. tokens: predicted
    positions.
    """

    perplexity_reference: float
    perplexity: float
    kl_divergence: float
    top1_agreement: float
    tokens: int


def log_probabilities(logits: Tensor) -> Tensor:
    """logits: (n, vocabulary), any dtype; returns the same shape, float32."""
    return torch.log_softmax(logits.float(), dim=-1)


def nll(log_probs: Tensor, targets: Tensor) -> float:
    """log_probs: (n, vocabulary); targets: (n,) int64. Returns the summed negative log-likelihood in nats."""
    return -_sum(log_probs.gather(1, targets[:, None]))


def kl_divergence(reference: Tensor, log_probs: Tensor) -> float:
    """Both (n, vocabulary) log-probabilities. Returns the sum over positions of KL(reference || model) in nats.

    A token that the reference rules out (-inf) adds nothing, as 0 log 0 is 0.
    """
    terms = reference.exp() * (reference - log_probs)
    return _sum(terms.masked_fill_(reference == -math.inf, 0.0))


def _sum(values: Tensor) -> float:
    """Of values (n, m) float32: rows in float32, all of them in float64, which not every device has."""
    return float(values.sum(1).cpu().double().sum())


def top1(reference: Tensor, log_probs: Tensor) -> int:
    """Both (n, vocabulary). Returns at how many positions the likeliest token is the same."""
    return int((reference.argmax(dim=-1) == log_probs.argmax(dim=-1)).sum())


def tally(reference_logits: Tensor, logits: Tensor, targets: Tensor, at_once: int = POSITIONS_AT_ONCE) -> Tally:
    """Add up all measures over positions, `at_once` of them in float32 at a time.

    reference_logits, logits: (n, vocabulary), any dtype and device; targets: (n,) int64.
    """
    total = Tally()
    for start in range(0, len(targets), at_once):
        part = slice(start, start + at_once)
        reference = log_probabilities(reference_logits[part])
        model = log_probabilities(logits[part].to(reference.device))
        expected = targets[part].to(reference.device)
        total += Tally(
            nll(reference, expected),
            nll(model, expected),
            kl_divergence(reference, model),
            top1(reference, model),
            len(expected),
        )
    return total


@torch.no_grad()
def compare(reference: Any, model: Any, tokens: Tensor, batch_size: int = 1) -> Comparison:
    """Run both models on the same tokens and measure the distance.

    reference, model: Hugging Face causal language models, each on a device and in a dtype of its own. tokens:
    (n, seqlen) int64 without padding. The logits of `batch_size` samples are held for both at once.
    Raises SpecError when there is nothing to predict.
    """
    total = Tally()
    for batch in _batches(tokens, batch_size):
        targets = batch[:, 1:].reshape(-1)
        total += tally(_logits(reference, batch), _logits(model, batch), targets)
    return Comparison(
        perplexity_reference=math.exp(total.reference_nll / total.positions),
        perplexity=math.exp(total.nll / total.positions),
        kl_divergence=total.kl / total.positions,
        top1_agreement=total.agreements / total.positions,
        tokens=total.positions,
    )


@torch.no_grad()
def perplexity(model: Any, tokens: Tensor, batch_size: int = 1) -> float:
    """Perplexity of one model on tokens (n, seqlen) int64; the same number that `compare` gives."""
    total, positions = 0.0, 0
    for batch in _batches(tokens, batch_size):
        logits, targets = _logits(model, batch), batch[:, 1:].reshape(-1)
        for start in range(0, len(targets), POSITIONS_AT_ONCE):
            part = slice(start, start + POSITIONS_AT_ONCE)
            total += nll(log_probabilities(logits[part]), targets[part].to(logits.device))
        positions += len(targets)
    return math.exp(total / positions)


def held_out_text() -> str:
    """English prose on varied subjects, written for this package; no calibration set has it."""
    return resources.files("auto_round.evaluate").joinpath("text.txt").read_text(encoding="utf-8")


def evaluate_tokens(tokenizer: Any, text: str, seqlen: int, limit: int | None = None) -> Tensor:
    """Cut `text` into samples: (n, seqlen) int64, at most `limit` of them; a short rest is left out.

    Each sample starts with the BOS token when the tokenizer puts one before a text, since such models need it.
    Raises SpecError when the text is shorter than one sample.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    whole = tokenizer(text, verbose=False)["input_ids"]
    bos = tokenizer.bos_token_id
    lead = [bos] if bos is not None and whole[:1] == [bos] and ids[:1] != [bos] else []
    fresh = seqlen - len(lead)
    count = len(ids) // fresh if fresh > 0 else 0
    if count == 0:
        raise SpecError(f"the text to evaluate on has {len(ids)} tokens, too few for one sample of {seqlen}")
    starts = range(0, fresh * (count if limit is None else min(count, limit)), fresh)
    return torch.tensor([lead + ids[start : start + fresh] for start in starts], dtype=torch.int64)


@torch.no_grad()
def greedy(model: Any, tokenizer: Any, prompt: str, new_tokens: int) -> str:
    """Continue `prompt` by the likeliest token each time; return only the new text."""
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    # None takes back what a folder's generation config says on sampling, which is warned of otherwise.
    sampling = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    output = model.generate(**inputs, max_new_tokens=new_tokens, pad_token_id=pad, **sampling)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def _batches(tokens: Tensor, batch_size: int) -> Iterator[Tensor]:
    if tokens.ndim != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise SpecError(f"tokens have shape {tuple(tokens.shape)}; samples of at least 2 tokens are needed")
    for start in range(0, len(tokens), batch_size):
        yield tokens[start : start + batch_size]


def _logits(model: Any, batch: Tensor) -> Tensor:
    """batch: (b, t); returns (b * (t - 1), vocabulary), the predictions of every token but the first."""
    logits: Tensor = model(input_ids=batch.to(model.device), use_cache=False).logits
    return logits[:, :-1].flatten(0, 1)
