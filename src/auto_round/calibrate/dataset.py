"""The calibration set: token ids of every sample, and one way to get them from whatever the user names."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from auto_round.calibrate.corpora import SELF, load
from auto_round.calibrate.documents import Corpus
from auto_round.calibrate.spec import DatasetSpec, parse_dataset
from auto_round.calibrate.text import Draw, Encoder, degenerate, draw, fewer
from auto_round.errors import CalibrationError
from auto_round.runtime.events import Listener

# Text in the mini-language, texts, or token ids: one sample a row.
# Mappings are image-text pairs, see `auto_round.calibrate.pairs`.
Dataset = str | Sequence[str] | Sequence[Sequence[int]] | Sequence[Tensor] | Sequence[Mapping[str, Any]] | Tensor

# A tokenizer that does not know more of the text than this is not made for it.
_UNKNOWN_SHARE = 0.2


@dataclass(frozen=True, eq=False)
class CalibrationSet:
    """Samples to tune on.

    tokens: (nsamples, seqlen) int64, padded on the right. mask: (nsamples, seqlen) bool, True where a token is real; a
    sample without any is blank, and the model has yet to write it. source: what was really used, for people. beside:
    for every sample the model's other inputs (pixels), as for a batch of one; empty for text.
    """

    tokens: Tensor
    mask: Tensor
    source: str
    beside: tuple[Mapping[str, Tensor], ...] = ()

    def __post_init__(self) -> None:
        if self.tokens.dim() != 2 or not self.tokens.numel() or self.tokens.dtype != torch.int64:
            raise CalibrationError(f"calibration tokens are {self.tokens.dtype} {tuple(self.tokens.shape)}")
        if self.mask.shape != self.tokens.shape or self.mask.dtype != torch.bool:
            raise CalibrationError(f"the calibration mask is {self.mask.dtype} {tuple(self.mask.shape)}")

    def first(self, count: int) -> CalibrationSet:
        """The first `count` samples."""
        return replace(self, tokens=self.tokens[:count], mask=self.mask[:count], beside=self.beside[:count])

    @property
    def blank(self) -> Tensor:
        """(nsamples,) bool, True for the samples that the model has yet to write."""
        return ~self.mask.any(1)

    def filled(self, texts: Tensor) -> CalibrationSet:
        """With `texts`, (blank samples, seqlen) token ids, in the place of the blank samples."""
        tokens, blank = self.tokens.clone(), self.blank
        tokens[blank] = texts
        return replace(self, tokens=tokens, mask=self.mask | blank[:, None])

    def inserted(self, at: int, tokens: Tensor, source: str) -> CalibrationSet:
        """With more samples of text, `tokens` as wide as these, before the sample `at`."""
        title = f"{self.source}, and {len(tokens)} of {source}"
        rows = torch.ones_like(tokens, dtype=torch.bool)
        return CalibrationSet(
            torch.cat([self.tokens[:at], tokens, self.tokens[at:]]),
            torch.cat([self.mask[:at], rows, self.mask[at:]]),
            title,
        )

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the tokens (int64), the mask (one byte each) and the other inputs, as hexadecimal digits."""
        digest = hashlib.sha256(self.tokens.cpu().contiguous().numpy().astype("<i8").tobytes())
        digest.update(self.mask.cpu().contiguous().numpy().tobytes())
        for sample in self.beside:
            for key in sorted(sample):
                digest.update(
                    key.encode() + sample[key].cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
                )
        return digest.hexdigest()

    @property
    def token_count(self) -> int:
        """Real tokens in all samples."""
        return int(self.mask.sum())

    def summary(self) -> dict[str, str | int]:
        """What the output's record keeps of the set."""
        samples, seqlen = self.tokens.shape
        return {
            "source": self.source,
            "samples": samples,
            "seqlen": seqlen,
            "tokens": self.token_count,
            "digest": self.digest,
        }


def build_calibration(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    nsamples: int,
    seqlen: int,
    seed: int,
    listener: Listener,
) -> CalibrationSet:
    """Return `nsamples` samples of `seqlen` tokens; the same arguments give the same set.

    dataset: the mini-language of `auto_round.calibrate.spec`, a list of texts, or token ids in rows. Rows of token ids
    are taken in order, cut to `seqlen` and padded to the longest; text is drawn in an order that `seed` gives.
    tokenizer: the model's; None is enough for token ids. Samples of the set "self" are blank.
    Raises CalibrationError when the set is not there, empty, too small or outside the vocabulary.
    """
    if not isinstance(dataset, (str, Tensor, list, tuple)):
        raise CalibrationError(
            f"dataset is a {type(dataset).__name__}; expected a name, a list of texts, or token ids as rows"
        )
    if isinstance(dataset, Tensor) and dataset.dim() != 2:
        raise CalibrationError(f"the dataset has shape {tuple(dataset.shape)}; expected token ids (samples, tokens)")
    if len(dataset) == 0:
        raise CalibrationError("the dataset is empty")
    wanted = Draw(nsamples, seqlen, str(seed), None)
    if isinstance(dataset, str):
        built = _from_specs(parse_dataset(dataset), tokenizer, wanted, listener)
    elif isinstance(dataset[0], str):
        corpus = Corpus(_texts(dataset), f"a list of {len(dataset)} texts")
        built = CalibrationSet(*_full(draw(corpus, Encoder(_needed(tokenizer)), wanted, listener)), corpus.title)
    else:
        built = _from_ids(dataset, tokenizer, wanted, listener)
    _check_vocabulary(built, tokenizer)
    _warn_of_unknown(built, tokenizer, listener)
    return built


def _from_specs(
    specs: tuple[DatasetSpec, ...],
    tokenizer: PreTrainedTokenizerBase | None,
    wanted: Draw,
    listener: Listener,
) -> CalibrationSet:
    pieces, titles = [], []
    shares = _shares(specs, wanted.count)
    if sum(shares) < wanted.count:
        listener.note(f"num= asks for {sum(shares)} samples in all: that many are used, not nsamples={wanted.count}")
    for index, (spec, count) in enumerate(zip(specs, shares, strict=True)):
        if spec.name == SELF:
            if spec.splits or spec.concat is not None or spec.apply_chat_template:
                raise CalibrationError(f"the set self takes no option but num=; got {spec}")
            built, title = _blank(count, wanted.seqlen), "self (sampled by the model)"
        else:
            usable = _needed(tokenizer)
            corpus = load(spec, count * wanted.seqlen, listener)
            encoder = Encoder(usable, chat=spec.apply_chat_template, system_prompt=spec.system_prompt)
            # Two sets out of one file do not draw the same documents in the same order.
            order = wanted.seed if index == 0 else f"{wanted.seed}/{index}"
            rows = draw(corpus, encoder, replace(wanted, count=count, seed=order, concat=spec.concat), listener)
            built, title = _full(rows), corpus.title
        pieces.append(built)
        titles.append(title if len(specs) == 1 else f"{count} x {title}")
    tokens, mask = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    if len(specs) > 1:
        # Samples held out at either end must come from all of the sets.
        order_of_rows = list(range(len(tokens)))
        random.Random(wanted.seed).shuffle(order_of_rows)
        tokens, mask = tokens[order_of_rows], mask[order_of_rows]
    return CalibrationSet(tokens, mask, ", ".join(titles))


def sampled_count(dataset: Dataset, nsamples: int) -> int:
    """How many of `nsamples` samples the model is to write; CalibrationError when the dataset makes no sense."""
    if not isinstance(dataset, str):
        return 0
    specs = parse_dataset(dataset)
    return sum(count for spec, count in zip(specs, _shares(specs, nsamples), strict=True) if spec.name == SELF)


def _shares(specs: tuple[DatasetSpec, ...], nsamples: int) -> list[int]:
    """Samples of every set: those with num= as they say, the others an even share of what is left."""
    asked = sum(spec.num or 0 for spec in specs)
    open_sets = sum(spec.num is None for spec in specs)
    left = nsamples - asked
    if left < open_sets:
        behind = f" and {open_sets} more sets share the rest" if open_sets else ""
        raise CalibrationError(
            f"num= asks for {asked} samples{behind}, but there are {nsamples} in all; "
            f"pass nsamples={asked + open_sets} or more, or a smaller num="
        )
    if not open_sets:
        return [spec.num or 0 for spec in specs]
    even, extra = divmod(left, open_sets)
    shares = iter([even + (place < extra) for place in range(open_sets)])
    return [next(shares) if spec.num is None else spec.num for spec in specs]


def _from_ids(
    dataset: Sequence[object] | Tensor, tokenizer: PreTrainedTokenizerBase | None, wanted: Draw, listener: Listener
) -> CalibrationSet:
    rows = [_row(values, number)[: wanted.seqlen] for number, values in enumerate(dataset, 1)]
    kept = [row for row in rows if not degenerate(row)]
    if len(kept) < len(rows):
        listener.note(f"{len(rows) - len(kept)} samples are dropped: one token fills more than half of each")
    if len(kept) < wanted.count:
        remedy = f"pass {fewer(len(kept), wanted.count)} or more of them" if kept else "pass others"
        raise CalibrationError(f"the token ids make {len(kept)} usable samples of the {wanted.count} wanted; {remedy}")
    kept = kept[: wanted.count]
    padding = getattr(tokenizer, "pad_token_id", None) or 0  # None has none, nor have some tokenizers
    tokens = torch.nn.utils.rnn.pad_sequence(kept, batch_first=True, padding_value=padding)
    lengths = torch.tensor([len(row) for row in kept])
    mask = torch.arange(tokens.shape[1]) < lengths[:, None]  # (samples, tokens)
    return CalibrationSet(tokens, mask, "token ids that were given")


def _row(values: object, number: int) -> Tensor:
    """One sample of token ids, (tokens,) int64 on the CPU."""
    try:
        row = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        raise CalibrationError(f"row {number} of the dataset is neither text nor token ids: {values!r:.60}") from None
    if row.dim() != 1 or not len(row) or row.is_floating_point() or row.dtype == torch.bool:
        raise CalibrationError(
            f"row {number} of the dataset is {row.dtype} {tuple(row.shape)}; expected (tokens,) whole numbers"
        )
    return row.to("cpu", torch.int64)


def _texts(dataset: Sequence[object] | Tensor) -> list[str]:
    texts = [text for text in dataset if isinstance(text, str)]
    if len(texts) < len(dataset):
        raise CalibrationError("the dataset mixes texts with something else; expected a list of texts only")
    return texts


def _needed(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise CalibrationError("a tokenizer is needed to calibrate on text; pass one, or token ids as dataset")
    return tokenizer


def _full(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and mask of samples without padding."""
    return tokens, torch.ones_like(tokens, dtype=torch.bool)


def _blank(count: int, seqlen: int) -> tuple[Tensor, Tensor]:
    """Tokens and mask of samples that the model has yet to write."""
    return torch.zeros(count, seqlen, dtype=torch.int64), torch.zeros(count, seqlen, dtype=torch.bool)


def _check_vocabulary(built: CalibrationSet, tokenizer: PreTrainedTokenizerBase | None) -> None:
    low, high = int(built.tokens.min()), int(built.tokens.max())
    size = None if tokenizer is None else len(tokenizer)
    if low < 0 or (size is not None and high >= size):
        bound = "" if size is None else f" to {size - 1}"
        raise CalibrationError(f"the dataset holds token id {low if low < 0 else high}; the tokenizer has 0{bound}")


def _warn_of_unknown(built: CalibrationSet, tokenizer: PreTrainedTokenizerBase | None, listener: Listener) -> None:
    unknown = getattr(tokenizer, "unk_token_id", None)  # a tokenizer may have none
    if unknown is None:
        return
    share = float(((built.tokens == unknown) & built.mask).sum()) / max(1, built.token_count)
    if share > _UNKNOWN_SHARE:
        listener.warn(
            f"{share:.0%} of the calibration tokens from {built.source} are unknown to the tokenizer; "
            "is it the model's own, and is the text in a language it knows?"
        )
