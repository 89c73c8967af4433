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
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from auto_round.calibrate.dataset import CalibrationSet
from auto_round.calibrate.text import Encoder
from auto_round.errors import CalibrationError

AT_ONCE = 1 << 14  # tokens whose keys and values are in memory: a step reads all weights, for however many texts
STRETCHES = 4  # texts in a sample where they go on from given ones; short ones stay near these, and are written faster
PIECE = 0.25  # share of such a text that is given
PART = 256  # tokens of the vocabulary that are drawn from together
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
        """SHA-256 of all of it and of how tokens are drawn, as hexadecimal digits: what decides the texts."""
        facts = (self.tokens.shape, self.length, self.likeliest, self.seed, AT_ONCE, PART)
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
    likely = torch.empty(0)  # (batch, vocabulary and what it lacks to whole parts)
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
            likely = logits.new_empty(len(logits), math.ceil(len(allowed) / PART) * PART)
            _reserve(cache, tokens.shape[1])
        torch.add(logits, allowed, out=likely[:, : len(allowed)])
        likely[:, len(allowed) :] = -torch.inf
        chosen = _drawn(likely, generator) if place >= filled + begin.likeliest else likely.argmax(-1)
        current = chosen[:, None]
        tokens[:, place] = chosen.to(tokens.device)
        told(place + 1 - filled)


class _Reserved(DynamicLayer):  # type: ignore[misc]
    """Keys and values with room for all tokens that there will be: one more is added without copying the others."""

    def __init__(self, layer: DynamicLayer, length: int) -> None:
        """layer: what it takes the place of. length: tokens that there will be."""
        self.__dict__.update(vars(layer))
        self._rooms = [_room(values, length) for values in (layer.keys, layer.values)]
        self.keys, self.values = (
            room.narrow(-2, 0, values.shape[-2])
            for room, values in zip(self._rooms, (layer.keys, layer.values), strict=True)
        )
        self._length, self._mine = length, (self.keys, self.values)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add keys and values of some tokens; return those of all."""
        count, added = self.keys.shape[-2], key_states.shape[-2]
        # A model may keep tokens of its own, or put other values in.
        if count + added > self._length or self._mine[0] is not self.keys or self._mine[1] is not self.values:
            found: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return found
        for room, states in zip(self._rooms, (key_states, value_states), strict=True):
            room.narrow(-2, count, added).copy_(states)
        self._mine = self.keys, self.values = (
            self._rooms[0].narrow(-2, 0, count + added),
            self._rooms[1].narrow(-2, 0, count + added),
        )
        return self.keys, self.values


def _room(values: Tensor, length: int) -> Tensor:
    """Room (..., length, width) that begins with `values` (..., tokens, width)."""
    tokens = values.shape[-2]
    room = values.new_empty(*values.shape[:-2], max(length, tokens), values.shape[-1])
    room.narrow(-2, 0, tokens).copy_(values)
    return room


def _reserve(cache: Any, length: int) -> None:
    """Give ordinary layers of a cache of transformers that has seen a beginning room for `length` tokens."""
    layers = getattr(cache, "layers", [])
    for index, layer in enumerate(layers):
        # Those of other kinds, such as windows that slide, keep what they need by themselves.
        if type(layer) is DynamicLayer and layer.is_initialized:
            layers[index] = _Reserved(layer, length)


def _drawn(likely: Tensor, generator: torch.Generator) -> Tensor:
    """(batch,) int64 from the softmax of logits (batch, vocabulary): a part of the vocabulary, then a token of it.

    So there is noise for the parts and for one of them, not for the whole vocabulary. The logits are lost.
    """
    parts = torch.softmax(likely, -1, out=likely).unflatten(-1, (-1, PART))
    part = _one_of(parts.sum(-1), generator)
    inside = parts[torch.arange(len(parts), device=part.device), part]
    return part * PART + _one_of(inside, generator)


def _one_of(likely: Tensor, generator: torch.Generator) -> Tensor:
    """The place of one value in each row, drawn in proportion to the values.

    The largest of value / Exp(1) noise; unlike a running sum it is the same on every run on an accelerator.
    """
    return (likely / torch.empty_like(likely).exponential_(generator=generator)).argmax(-1)
