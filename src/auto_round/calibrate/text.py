"""From documents to samples: tokenise as the model's tokenizer does, draw whole documents, pack short ones."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from auto_round.calibrate.documents import Corpus, Document, Message
from auto_round.errors import CalibrationError
from auto_round.runtime.events import Listener

# Documents that are tokenised in one call: enough to keep the tokenizer's threads busy.
_BATCH = 32
# Below this many tokens, one of them standing in half of the places says nothing.
_TELLING = 16
PROBE = "Hello there"  # a user's words, by which a chat template shows whether it has a place for them


@dataclass(frozen=True)
class Draw:
    """What to draw: `count` samples of `seqlen` tokens, in an order that `seed` gives.

    concat: True packs all documents, False none, None only where whole documents are too few.
    """

    count: int
    seqlen: int
    seed: str
    concat: bool | None


class Encoder:
    """A tokenizer with its own special tokens, behind the chat template if asked.

    lead: what the tokenizer puts in front of every text (BOS, for most that do), (tokens,) int64.
    separator: what parts packed documents where `lead` does not.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, chat: bool = False, system_prompt: str | None = None):
        self._tokenizer, self._chat, self._system_prompt = tokenizer, chat, system_prompt
        self.lead = self._leading_tokens()
        parting = self._tokens(["\n\n"], specials=False)[0]
        nothing_to_say = len(self.lead) > 0 or tokenizer.unk_token_id in parting.tolist()
        self.separator = parting[:0] if nothing_to_say else parting

    def encode(self, documents: Sequence[Document]) -> list[Tensor]:
        """Return the tokens of each document, (tokens,) int64."""
        if self._chat:
            # The template writes the special tokens itself.
            return self._tokens([self._rendered(document) for document in documents], specials=False)
        return self._tokens([_plain(document) for document in documents], specials=True)

    def _tokens(self, texts: list[str], *, specials: bool) -> list[Tensor]:
        found = self._tokenizer(texts, add_special_tokens=specials, return_attention_mask=False, verbose=False)
        return [torch.tensor(ids, dtype=torch.int64) for ids in found["input_ids"]]

    def _leading_tokens(self) -> Tensor:
        with_specials, bare = (self._tokens(["a"], specials=specials)[0].tolist() for specials in (True, False))
        for at in range(len(with_specials) - len(bare) + 1):
            if bare and with_specials[at : at + len(bare)] == bare:
                return torch.tensor(with_specials[:at], dtype=torch.int64)
        return torch.tensor([], dtype=torch.int64)

    def _rendered(self, document: Document) -> str:
        messages: list[Message] = (
            [{"role": "user", "content": document}] if isinstance(document, str) else list(document)
        )
        if self._system_prompt is not None:
            messages = [message for message in messages if message["role"] != "system"]
            messages.insert(0, {"role": "system", "content": self._system_prompt})
        return self._templated(messages, parts=self._wants_parts)

    @cached_property
    def _wants_parts(self) -> bool:
        """True for templates of models that see: they look for parts in a message, and find none in a string.

        Raises CalibrationError when the template drops what a user says either way.
        """
        probe: list[Message] = [{"role": "user", "content": PROBE}]
        for parts in (False, True):
            if PROBE in self._templated(probe, parts=parts):
                return parts
        raise CalibrationError(
            "the tokenizer's chat template drops what a user says: leave out apply_chat_template and system_prompt"
        )

    def _templated(self, conversation: Sequence[Message], *, parts: bool) -> str:
        messages: list[Any] = list(conversation)
        if parts:
            messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        try:
            return str(self._tokenizer.apply_chat_template(messages, tokenize=False))
        except (TypeError, ValueError, TemplateError) as error:
            raise CalibrationError(f"the tokenizer's chat template cannot be applied: {error}") from error


def draw(corpus: Corpus, encoder: Encoder, wanted: Draw, listener: Listener) -> Tensor:
    """Return (count, seqlen) int64 out of `corpus`; raise CalibrationError saying what there is if it is too little."""
    if wanted.seqlen <= len(encoder.lead):
        raise CalibrationError(
            f"seqlen={wanted.seqlen} leaves no room for text behind the {len(encoder.lead)} tokens that the tokenizer "
            "puts in front; pass a larger seqlen"
        )
    documents = [document for document in corpus.documents if _plain(document).strip()]
    if not documents:
        raise CalibrationError(f"{corpus.title} holds no text")
    random.Random(wanted.seed).shuffle(documents)
    rows: list[Tensor] = []
    stream: Iterable[Tensor] = _encoded(documents, encoder)
    if wanted.concat is not True:
        rows, rest = _whole(stream, wanted)
        stream = rest
    whole, available = len(rows), sum(map(len, rows))
    if whole < wanted.count and wanted.concat is not False:
        packed, more = _pack(stream, encoder, wanted, wanted.count - whole)
        rows, available = rows + packed, available + more
    if len(rows) < wanted.count:
        raise CalibrationError(_shortage(corpus.title, len(rows), available, wanted))
    if wanted.concat is None and whole < wanted.count:
        listener.note(
            f"{corpus.title}: {whole} of {wanted.count} samples are single documents of {wanted.seqlen} tokens or "
            "more; the others are packed from several documents"
        )
    return torch.stack(rows)


def degenerate(ids: Tensor) -> bool:
    """True when one token takes more than half of the places of ids (tokens,): filler, or a tokenizer that fails."""
    return len(ids) >= _TELLING and int(torch.unique(ids, return_counts=True)[1].max()) * 2 > len(ids)


def _plain(document: Document) -> str:
    return document if isinstance(document, str) else "\n\n".join(message["content"] for message in document)


def _encoded(documents: Sequence[Document], encoder: Encoder) -> Iterator[Tensor]:
    for begin in range(0, len(documents), _BATCH):
        yield from encoder.encode(documents[begin : begin + _BATCH])


def _whole(stream: Iterable[Tensor], wanted: Draw) -> tuple[list[Tensor], list[Tensor]]:
    """The starts of documents that fill a sample, up to `count`; and the rest: short documents, then the tails."""
    rows: list[Tensor] = []
    short: list[Tensor] = []
    tails: list[Tensor] = []
    for ids in stream:
        if len(ids) < wanted.seqlen:
            short.append(ids)
        elif not degenerate(ids[: wanted.seqlen]):
            rows.append(ids[: wanted.seqlen])
            tails.append(ids[wanted.seqlen :])
            if len(rows) == wanted.count:
                break
    return rows, short + tails


def _pack(stream: Iterable[Tensor], encoder: Encoder, wanted: Draw, count: int) -> tuple[list[Tensor], int]:
    """Join documents and cut samples out of them, each behind `lead`; also say how many tokens there were at most."""
    lead, available = encoder.lead, 0
    rows: list[Tensor] = []
    waiting = torch.tensor([], dtype=torch.int64)
    for ids in stream:
        if not len(ids):
            continue
        available += len(ids)
        waiting = torch.cat([waiting, encoder.separator, ids]) if len(waiting) else ids
        begin = 0
        while len(rows) < count:
            front = lead[:0] if torch.equal(waiting[begin : begin + len(lead)], lead) else lead
            end = begin + wanted.seqlen - len(front)
            if end > len(waiting):
                break
            row = torch.cat([front, waiting[begin:end]])
            if not degenerate(row):
                rows.append(row)
            begin = end
        waiting = waiting[begin:]
        if len(rows) == count:
            break
    return rows, available


def fewer(found: int, wanted: int) -> str:
    """What to pass where only `found` of the `wanted` samples are there."""
    return f"nsamples={found} (the model writes the rest with self_nsamples={wanted - found})"


def _shortage(title: str, found: int, available: int, wanted: Draw) -> str:
    text = f"{title} gives {found} of the {wanted.count} samples of {wanted.seqlen} tokens"
    remedies = [fewer(found, wanted.count)] if found else []
    if wanted.concat is False:
        return f"{text} with concat=false; leave that out, or pass {' or '.join([*remedies, 'a smaller seqlen'])}"
    # A tenth is left for what is lost where samples are cut.
    shorter = available * 9 // (10 * wanted.count)
    remedies += [f"seqlen={shorter}"] if shorter > _TELLING else []
    return f"{text}: it has about {available} tokens; pass {' or '.join([*remedies, 'more text'])}"
