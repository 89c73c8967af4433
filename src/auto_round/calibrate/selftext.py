"""Calibration text that the model samples itself, where little or none can be found: the idea of LLM-QAT (arXiv
2305.17888).

Each text begins with what the tokenizer puts in front of one. Out of nothing, one ordinary token follows, drawn evenly
from the vocabulary, and the few likeliest ones behind it, so that text settles into a language; where there is text, a
piece of it. The rest is drawn from the model's own distribution.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from auto_round.calibrate.dataset import CalibrationSet
from auto_round.calibrate.text import Encoder
from auto_round.errors import CalibrationError

AT_ONCE = 1 << 14  # tokens whose keys and values are in memory: a step reads all weights, for however many texts
STRETCHES = 4  # texts in a sample where they go on from given ones; short ones stay near these, and are written faster
PIECE = 0.25  # share of such a text that is given
_LIKELIEST = 4

# (tokens done, tokens in all, of texts written one beside the other; (texts, length) that are finished) -> nothing
Told = Callable[[int, int, Tensor], None]


@dataclass(frozen=True, eq=False)
class Beginnings:
    """What texts begin with, before the model goes on.

    tokens: (texts, few) int64. length: tokens of a whole text. likeliest: so many tokens behind the beginning are the
    likeliest ones, not drawn. seed: of the draws.
    """

    tokens: Tensor
    length: int
    likeliest: int
    seed: int

    @property
    def digest(self) -> str:
        """SHA-256 of all of it and of how many are written at once, as hexadecimal digits: what decides the texts."""
        facts = (self.tokens.shape, self.length, self.likeliest, self.seed, AT_ONCE)
        digest = hashlib.sha256(repr(facts).encode())
        digest.update(self.tokens.contiguous().numpy().astype("<i8").tobytes())
        return digest.hexdigest()


def out_of_nothing(tokenizer: PreTrainedTokenizerBase, nsamples: int, seqlen: int, seed: int) -> Beginnings:
    """The beginnings of `nsamples` texts of `seqlen` tokens. Raises CalibrationError when there is no token to use."""
    starts = sorted(set(_ordinary(tokenizer)) - set(tokenizer.added_tokens_decoder))
    if not starts:
        raise CalibrationError("the tokenizer has no ordinary tokens that text could start with")
    first = torch.tensor(starts)[torch.randint(len(starts), (nsamples,), generator=torch.Generator().manual_seed(seed))]
    begin = torch.cat([Encoder(tokenizer).lead.expand(nsamples, -1), first[:, None]], 1)  # (nsamples, lead + 1)
    return Beginnings(begin[:, :seqlen], seqlen, _LIKELIEST, seed)


def pieces(tokenizer: PreTrainedTokenizerBase, given: CalibrationSet, nsamples: int, seed: int) -> Beginnings:
    """The beginnings of STRETCHES texts for each of `nsamples` samples: pieces of the same given sample.

    All given samples are used equally often; from where a piece is taken is drawn. `joined` makes samples of the texts.
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
    return Beginnings(torch.stack(begin)[:, :stretch], stretch, 0, seed)


def joined(texts: Tensor, seqlen: int) -> Tensor:
    """Samples (texts / STRETCHES, seqlen) of the texts that began with `pieces`."""
    return texts.reshape(len(texts) // STRETCHES, -1)[:, :seqlen]


def at_a_time(length: int, at_once: int = AT_ONCE) -> int:
    """How many texts of `length` tokens are written one beside the other."""
    return max(1, at_once // length)


def write(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    begin: Beginnings,
    known: Tensor | None = None,
    told: Told = lambda done, total, finished: None,
    at_once: int = AT_ONCE,
) -> Tensor:
    """Return (texts, length) int64 token ids on the CPU, the same for the same beginnings and machine.

    known: (some, length), the first of these texts as `told` had them from an earlier call, not written once more.
    told: hears of every token, see `Told`. at_once: tokens written together; another number gives other draws.
    Special tokens are never drawn: a text that has ended would fill its sample with the end. Raises CalibrationError
    when the model's output is not finite.
    """
    device = next(model.parameters()).device
    ordinary = _ordinary(tokenizer)
    count, few = begin.tokens.shape
    # Allocated outside inference mode: tokens made inside could not be used in training.
    tokens = torch.empty(count, begin.length, dtype=torch.int64)
    done = 0 if known is None else len(known)
    if known is not None:
        tokens[:done] = known
    training, batch, places = model.training, at_a_time(begin.length, at_once), begin.length - few
    total = math.ceil(count / batch) * places
    model.eval()
    try:
        for at in range(done, count, batch):
            rows, before = slice(at, at + batch), at // batch * places
            # Each batch draws by itself, so that it is the same when those before it are known.
            generator = torch.Generator(device).manual_seed(begin.seed + at // batch)

            def place(number: int, before: int = before, finished: int = at) -> None:
                told(before + number, total, tokens[:finished])

            _continue(model, begin.tokens[rows].to(device), tokens[rows], begin.likeliest, ordinary, generator, place)
            told(before + places, total, tokens[: rows.stop])
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
    model: nn.Module,
    begin: Tensor,
    tokens: Tensor,
    likeliest: int,
    ordinary: list[int],
    generator: torch.Generator,
    told: Callable[[int], None],
) -> None:
    """Fill tokens (batch, length) with `begin` (batch, few) and what the model makes of it. told: the tokens so far."""
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
        told(place + 1 - filled)
