"""Calibration text that the model samples itself, where little or none can be found: the idea of LLM-QAT (arXiv
2305.17888).

Each sample begins with what the tokenizer puts in front of a text. Out of nothing, one ordinary token follows, drawn
evenly from the vocabulary, and the few likeliest ones behind it, so that text settles into a language; where there is
text, a piece of it. The rest is drawn from the model's own distribution.
"""

from __future__ import annotations

import inspect
import math

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from auto_round.calibrate.dataset import CalibrationSet
from auto_round.calibrate.text import Encoder
from auto_round.errors import CalibrationError

AT_ONCE = 1 << 14  # tokens whose keys and values are in memory: a step reads all weights, for however many samples
STRETCHES = 4  # of text in a sample; short ones stay near what was given, and are written faster
PIECE = 0.25  # share of a stretch that is given
_LIKELIEST = 4


def sample_tokens(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    nsamples: int,
    seqlen: int,
    seed: int,
    at_once: int = AT_ONCE,
) -> Tensor:
    """Return (nsamples, seqlen) int64 token ids on the CPU, the same for the same seed and machine.

    at_once: tokens written together; another number gives other draws.
    Special tokens are never drawn: a text that has ended would fill its sample with the end. Raises CalibrationError
    when the model's output is not finite.
    """
    ordinary = _ordinary(tokenizer)
    starts = sorted(set(ordinary) - set(tokenizer.added_tokens_decoder))
    if not starts:
        raise CalibrationError("the tokenizer has no ordinary tokens that text could start with")
    first = torch.tensor(starts)[torch.randint(len(starts), (nsamples,), generator=torch.Generator().manual_seed(seed))]
    begin = torch.cat([Encoder(tokenizer).lead.expand(nsamples, -1), first[:, None]], 1)  # (nsamples, lead + 1)
    return _written(model, begin, _LIKELIEST, ordinary, seqlen, seed, at_once)


def continue_samples(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    given: CalibrationSet,
    nsamples: int,
    seed: int,
    at_once: int = AT_ONCE,
) -> Tensor:
    """Return (nsamples, tokens) int64 token ids as wide as those of `given`.

    A sample is a few stretches of text, each going on from a piece of the same given sample; all of these are used
    equally often, and from where a piece is taken is drawn. Else as `sample_tokens`.
    """
    lead = Encoder(tokenizer).lead
    count, seqlen = given.tokens.shape
    stretch = math.ceil(seqlen / STRETCHES)
    lengths = given.mask.sum(1).tolist()
    width = max(1, int(PIECE * min(stretch, *lengths)))
    generator = torch.Generator().manual_seed(seed)
    begin = []
    for number in range(nsamples * STRETCHES):
        row = number // STRETCHES % count
        first = min(len(lead), lengths[row] - width)  # a given sample begins with the lead itself
        at = int(torch.randint(first, lengths[row] - width + 1, (1,), generator=generator))
        begin.append(torch.cat([lead, given.tokens[row, at : at + width]]))
    written = _written(model, torch.stack(begin), 0, _ordinary(tokenizer), stretch, seed, at_once)
    return written.reshape(nsamples, -1)[:, :seqlen]


def _written(
    model: nn.Module, begin: Tensor, likeliest: int, ordinary: list[int], seqlen: int, seed: int, at_once: int
) -> Tensor:
    """(samples, seqlen) int64: the tokens of `begin` (samples, few) and what the model makes of them."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    begin = begin[:, :seqlen]
    # Allocated outside inference mode: tokens made inside could not be used in training.
    tokens = torch.empty(len(begin), seqlen, dtype=torch.int64)
    training = model.training
    batch_size = max(1, at_once // seqlen)
    model.eval()
    try:
        for at in range(0, len(begin), batch_size):
            rows = slice(at, at + batch_size)
            _continue(model, begin[rows].to(device), tokens[rows], likeliest, ordinary, generator)
    finally:
        model.train(training)
    return tokens


def _ordinary(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that are text: the model may know more than its tokenizer, and special ones are not text."""
    return sorted(set(range(len(tokenizer))) - _special(tokenizer))


def _special(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


@torch.inference_mode()
def _continue(
    model: nn.Module, begin: Tensor, tokens: Tensor, likeliest: int, ordinary: list[int], generator: torch.Generator
) -> None:
    """Fill tokens (batch, seqlen) with `begin` (batch, few) and what the model makes of it."""
    filled = begin.shape[1]
    tokens[:, :filled] = begin.to(tokens.device)
    allowed: Tensor | None = None
    current, cache = begin, None
    known = inspect.signature(model.forward).parameters
    name = "cache" if "cache" in known else "past_key_values"  # as it is called before transformers 5.23
    # Logits of a whole beginning can take more memory than the model.
    last = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
    for place in range(filled, tokens.shape[1]):
        output = model(input_ids=current, use_cache=True, **{name: cache}, **last)
        logits, cache = output.logits[:, -1].float(), getattr(output, name)  # (batch, vocabulary)
        if not torch.isfinite(logits).all():
            raise CalibrationError("the model's output is not finite; text cannot be sampled from it")
        if allowed is None:
            allowed = torch.full_like(logits[0], -torch.inf)  # (vocabulary,)
            allowed[torch.tensor(ordinary, device=logits.device)] = 0
        logits = logits + allowed
        if place >= filled + likeliest:
            # The largest of probability / Exp(1) noise is a draw from the probabilities; unlike a running sum over
            # the vocabulary it is the same on every run on an accelerator.
            noise = torch.empty_like(logits).exponential_(generator=generator)
            logits = logits.softmax(-1) / noise
        current = logits.argmax(-1, keepdim=True)  # (batch, 1)
        tokens[:, place] = current[:, 0].to(tokens.device)
