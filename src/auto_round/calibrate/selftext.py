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

# (rounds done, rounds in all, the texts (some, length) that are finished) -> nothing; a round adds one token to each of
# the texts that are written together.
Told = Callable[[int, int, Tensor], None]


@dataclass(frozen=True, eq=False)
class Beginnings:
    """What texts begin with, before the model goes on.

    tokens: (texts, few) int64. length: tokens of a whole text. likeliest: so many tokens behind the beginning are the
    likeliest ones, not drawn. ordinary: (tokens,) int64, those that may come; special ones are not text, and one that
    has ended would fill its sample with the end. seed: of the draws.
    """

    tokens: Tensor
    length: int
    likeliest: int
    ordinary: Tensor
    seed: int

    @property
    def digest(self) -> str:
        """SHA-256 of all of it and of how many are written at once, as hexadecimal digits: what decides the texts."""
        facts = (self.tokens.shape, self.length, self.likeliest, self.seed, AT_ONCE)
        digest = hashlib.sha256(repr(facts).encode())
        for values in (self.tokens, self.ordinary):
            digest.update(values.contiguous().numpy().astype("<i8").tobytes())
        return digest.hexdigest()


def words_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what of a tokenizer decides how texts begin and go on, as hexadecimal digits."""
    facts = (Encoder(tokenizer).lead.tolist(), _ordinary(tokenizer), _starts(tokenizer))
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def out_of_nothing(tokenizer: PreTrainedTokenizerBase, nsamples: int, seqlen: int, seed: int) -> Beginnings:
    """The beginnings of `nsamples` texts of `seqlen` tokens. Raises CalibrationError when there is no token to use."""
    starts = _starts(tokenizer)
    if not starts:
        raise CalibrationError("the tokenizer has no ordinary tokens that text could start with")
    first = torch.tensor(starts)[torch.randint(len(starts), (nsamples,), generator=torch.Generator().manual_seed(seed))]
    begin = torch.cat([Encoder(tokenizer).lead.expand(nsamples, -1), first[:, None]], 1)  # (nsamples, lead + 1)
    return Beginnings(begin[:, :seqlen], seqlen, _LIKELIEST, torch.tensor(_ordinary(tokenizer)), seed)


def pieces(tokenizer: PreTrainedTokenizerBase, given: CalibrationSet, nsamples: int, seed: int) -> Beginnings:
    """The beginnings of STRETCHES texts for each of `nsamples` samples: pieces of the same given sample.

    All given samples that are long enough are used equally often, and if none is, all; from where a piece is taken is
    drawn. `joined` makes samples of the texts.
    """
    lead = Encoder(tokenizer).lead
    count, seqlen = given.tokens.shape
    stretch = math.ceil(seqlen / STRETCHES)
    lengths = given.mask.sum(1).tolist()
    usable = [row for row in range(count) if lengths[row] >= PIECE * stretch] or list(range(count))
    width = max(1, int(PIECE * min(stretch, *(lengths[row] for row in usable))))
    generator = torch.Generator().manual_seed(seed)
    begin = []
    for number in range(nsamples * STRETCHES):
        row = usable[number // STRETCHES % len(usable)]
        first = min(len(lead), lengths[row] - width)  # a given sample begins with the lead itself
        at = int(torch.randint(first, lengths[row] - width + 1, (1,), generator=generator))
        begin.append(torch.cat([lead, given.tokens[row, at : at + width]]))
    return Beginnings(torch.stack(begin)[:, :stretch], stretch, 0, torch.tensor(_ordinary(tokenizer)), seed)


def joined(texts: Tensor, seqlen: int) -> Tensor:
    """Samples (texts / STRETCHES, seqlen) of the texts that began with `pieces`."""
    return texts.reshape(len(texts) // STRETCHES, -1)[:, :seqlen]


def at_a_time(length: int, at_once: int = AT_ONCE) -> int:
    """How many texts of `length` tokens are written one beside the other."""
    return max(1, at_once // length)


def write(
    model: nn.Module,
    begin: Beginnings,
    known: Tensor | None = None,
    told: Told = lambda done, total, finished: None,
    at_once: int = AT_ONCE,
) -> Tensor:
    """Return (texts, length) int64 token ids on the CPU, the same for the same beginnings and machine.

    known: (some, length), the first of these texts as `told` had them from an earlier call, not written once more.
    told: hears of every round, see `Told`. at_once: tokens written together; another number gives other draws.
    Raises CalibrationError when the model's output is not finite.
    """
    device = next(model.parameters()).device
    count, few = begin.tokens.shape
    # Allocated outside inference mode: tokens made inside could not be used in training.
    tokens = torch.empty(count, begin.length, dtype=torch.int64)
    start = 0
    if known is not None:
        start = len(known)
        tokens[:start] = known
    training, batch, places = model.training, at_a_time(begin.length, at_once), begin.length - few
    total = math.ceil(count / batch) * places
    model.eval()
    try:
        for at in range(start, count, batch):
            number, rows = at // batch, slice(at, at + batch)

            def place(done: int, number: int = number, rows: slice = rows) -> None:
                told(number * places + done, total, tokens[: rows.stop if done == places else rows.start])

            # Each batch draws by itself, so that it is the same when those before it are known.
            generator = torch.Generator(device).manual_seed(begin.seed + number)
            _continue(model, begin, rows, tokens[rows], generator, place)
    finally:
        model.train(training)
    return tokens


def _ordinary(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that are text: the model may know more than its tokenizer, and special ones are not text."""
    return sorted(set(range(len(tokenizer))) - _special(tokenizer))


def _starts(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Those that a text may start with."""
    return sorted(set(_ordinary(tokenizer)) - set(tokenizer.added_tokens_decoder))


def _special(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


@torch.inference_mode()
def _continue(
    model: nn.Module,
    begin: Beginnings,
    rows: slice,
    tokens: Tensor,
    generator: torch.Generator,
    told: Callable[[int], None],
) -> None:
    """Fill tokens (batch, length) with the `rows` of the beginnings and what the model makes of them.

    told: hears how many tokens of each text are written.
    """
    filled = begin.tokens.shape[1]
    tokens[:, :filled] = begin.tokens[rows]
    allowed: Tensor | None = None
    current, cache = begin.tokens[rows].to(generator.device), None
    known = inspect.signature(model.forward).parameters
    name = "cache" if "cache" in known else "past_key_values"  # as it is called before transformers 5.23
    # Logits of a whole beginning can take more memory than the model.
    last = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
    for place in range(filled, tokens.shape[1]):
        output = model(input_ids=current, use_cache=True, **{name: cache}, **last)
        logits, cache = output.logits[:, -1].float(), getattr(output, name)  # (batch, vocabulary)
        if not torch.isfinite(logits.amax(-1)).all():  # a model may rule some tokens out by minus infinity
            raise CalibrationError("the model's output is not finite; text cannot be sampled from it")
        if allowed is None:
            allowed = torch.full_like(logits[0], -torch.inf)  # (vocabulary,)
            allowed[begin.ordinary.to(logits.device)] = 0
        logits = logits + allowed
        if place >= filled + begin.likeliest:
            # The largest of probability / Exp(1) noise is a draw from the probabilities; unlike a running sum over
            # the vocabulary it is the same on every run on an accelerator.
            noise = torch.empty_like(logits).exponential_(generator=generator)
            logits = logits.softmax(-1) / noise
        current = logits.argmax(-1, keepdim=True)  # (batch, 1)
        tokens[:, place] = current[:, 0].to(tokens.device)
        told(place + 1 - filled)
