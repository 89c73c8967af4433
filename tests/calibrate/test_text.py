"""Drawing samples: whole documents first, packed ones where those are too few; BOS and templates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from auto_round.calibrate.documents import Corpus
from auto_round.calibrate.text import Draw, Encoder, degenerate, draw
from auto_round.errors import CalibrationError

Words = Callable[..., PreTrainedTokenizerFast]


def text(first: int, count: int) -> str:
    return " ".join(f"w{n}" for n in range(first, first + count))


LONG = [text(100 * n, 40) for n in range(6)]
SHORT = [text(100 * n + 50, 10) for n in range(6)]


@pytest.mark.parametrize("bos", [True, False])
def test_enough_long_documents_are_cut_and_short_ones_left_out(words: Words, heard: Any, bos: bool) -> None:
    rows = draw(Corpus(LONG + SHORT, "c"), Encoder(words(bos=bos)), Draw(6, 32, "0", None), heard)
    assert rows.shape == (6, 32)
    assert rows.dtype == torch.int64
    starts = sorted(rows[:, 1 if bos else 0].tolist())
    assert starts == [10 + 100 * n for n in range(6)]
    assert bool((rows[:, 0] == 1).all()) == bos
    assert heard.notes == []


def test_short_documents_are_packed_behind_bos_when_there_are_too_few_long_ones(words: Words, heard: Any) -> None:
    rows = draw(Corpus(LONG[:1] + SHORT, "c"), Encoder(words(bos=True)), Draw(3, 32, "0", None), heard)
    assert rows[0].tolist() == [1, *range(10, 41)]
    assert rows[:, 0].tolist() == [1, 1, 1]
    # The next sample begins inside a document: it has a BOS of its own, and no token is lost or doubled.
    assert len({*rows[1].tolist(), *rows[2].tolist()} - {1}) == (rows[1:] != 1).sum()
    assert int((rows[1] == 1).sum()) == 3
    assert "1 of 3 samples are single documents" in heard.notes[0]


def test_packed_documents_are_parted_by_a_blank_line_where_there_is_no_bos(words: Words, heard: Any) -> None:
    (row,) = draw(Corpus(SHORT[:2], "c"), Encoder(words(bos=False)), Draw(1, 21, "0", True), heard).tolist()
    assert row[10] == 3
    assert sorted(row) == [3, *range(60, 70), *range(160, 170)]


def test_tails_of_long_documents_are_used_last(words: Words, heard: Any) -> None:
    encoder = Encoder(words(bos=False))
    rows = draw(Corpus([text(0, 100)], "c"), encoder, Draw(3, 32, "0", None), heard)
    assert rows.flatten().tolist() == list(range(10, 106))


def test_concat_packs_everything(words: Words, heard: Any) -> None:
    rows = draw(Corpus(LONG, "c"), Encoder(words(bos=True)), Draw(7, 32, "0", True), heard)
    assert rows[:, 0].tolist() == [1] * 7
    assert sum((rows == 1).sum(1) > 1) > 1
    assert heard.notes == []


def test_too_little_text_is_an_error_that_says_what_to_pass(words: Words, heard: Any) -> None:
    encoder = Encoder(words(bos=True))
    corpus = Corpus(LONG + SHORT, "corpus")
    with pytest.raises(CalibrationError) as packed:
        draw(corpus, encoder, Draw(20, 32, "0", None), heard)
    assert "corpus gives 9 of the 20 samples of 32 tokens: it has about 3" in str(packed.value)
    assert "pass nsamples=9 (the model writes the rest with self_nsamples=11) or" in str(packed.value)
    assert draw(corpus, encoder, Draw(9, 32, "0", None), heard).shape == (9, 32)
    with pytest.raises(CalibrationError, match=r"gives 6 of the 7 .* with concat=false; leave that out, or pass nsam"):
        draw(corpus, encoder, Draw(7, 32, "0", False), heard)
    with pytest.raises(
        CalibrationError, match=r"gives 0 of the 4 samples of 400 tokens: .* pass seqlen=7[0-9] or more"
    ):
        draw(corpus, encoder, Draw(4, 400, "0", None), heard)


def test_the_seqlen_that_an_error_names_works(words: Words, heard: Any) -> None:
    encoder, corpus = Encoder(words(bos=True)), Corpus(LONG + SHORT, "corpus")
    with pytest.raises(CalibrationError) as short:
        draw(corpus, encoder, Draw(10, 40, "0", True), heard)
    seqlen = int(str(short.value).split("seqlen=")[1].split()[0])
    assert 20 < seqlen < 40
    assert draw(corpus, encoder, Draw(10, seqlen, "0", True), heard).shape == (10, seqlen)


def test_no_text_and_no_room(words: Words, heard: Any) -> None:
    encoder = Encoder(words(bos=True))
    for documents in ([], ["", " \n"]):
        with pytest.raises(CalibrationError, match=r"empty.txt holds no text"):
            draw(Corpus(documents, "empty.txt"), encoder, Draw(1, 8, "0", None), heard)
    with pytest.raises(CalibrationError, match=r"seqlen=1 leaves no room"):
        draw(Corpus(LONG, "c"), encoder, Draw(1, 1, "0", None), heard)


def test_filler_is_dropped(words: Words, heard: Any) -> None:
    filler = "w1 " * 60
    rows = draw(
        Corpus([filler, LONG[0], filler, LONG[1]], "c"), Encoder(words(bos=True)), Draw(2, 32, "0", None), heard
    )
    assert sorted(rows[:, 1].tolist()) == [10, 110]
    with pytest.raises(CalibrationError, match=r"gives 0 of the 1"):
        draw(Corpus([filler], "c"), Encoder(words(bos=True)), Draw(1, 32, "0", None), heard)


def test_filler_is_dropped_from_packed_samples(words: Words, heard: Any) -> None:
    corpus = Corpus(["w1 " * 200, *LONG], "c")
    for seed in "0123":  # the filler comes first, last and between
        rows = draw(corpus, Encoder(words(bos=True)), Draw(6, 32, seed, True), heard)
        assert not any(degenerate(row) for row in rows)


def test_degenerate_means_more_than_half() -> None:
    half = torch.tensor([7] * 10 + list(range(10, 20)))
    assert not degenerate(half)
    assert degenerate(torch.cat([half, torch.tensor([7])]))
    assert not degenerate(torch.tensor([7, 7, 7]))


def test_the_seed_alone_decides(words: Words, heard: Any) -> None:
    def order(seed: str) -> list[int]:
        torch.manual_seed(len(seed))
        rows = draw(Corpus(LONG, "c"), Encoder(words(bos=False)), Draw(6, 32, seed, None), heard)
        return [int(first) for first in rows[:, 0]]

    assert order("1") == order("1")
    assert len({tuple(order(str(seed))) for seed in range(5)}) == 5


def test_the_chat_template_writes_the_special_tokens(words: Words) -> None:
    encoder = Encoder(words(bos=True), chat=True, system_prompt="Be kind, please")
    conversation = (
        {"role": "system", "content": "w9"},
        {"role": "user", "content": "w1"},
        {"role": "assistant", "content": "w2"},
    )
    plain, spoken = encoder.encode(["w1 w2", conversation])
    system = [4, 7, 8, 9, 2]
    assert plain.tolist() == [*system, 5, 11, 12, 2]
    assert spoken.tolist() == [*system, 5, 11, 2, 6, 12, 2]


def test_messages_without_a_template_are_their_text(words: Words) -> None:
    conversation = ({"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"})
    assert Encoder(words(bos=True)).encode([conversation])[0].tolist() == [1, 11, 3, 12]


def test_a_template_that_is_missing_or_refuses_is_an_error(words: Words) -> None:
    tokenizer = words(bos=True)
    for template in (None, "{{ raise_exception('no system role') }}"):
        tokenizer.chat_template = template
        with pytest.raises(CalibrationError, match=r"chat template cannot be applied: .*(not set|no system role)"):
            Encoder(tokenizer, chat=True).encode(["w1"])


PARTS = (
    "{% for m in messages %}{{ m['role'] }} {% for part in m['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }} {% endif %}{% endfor %}</s> {% endfor %}"
)


def test_templates_that_look_for_parts_get_them(words: Words) -> None:
    """As those of LLaVA, Idefics and SmolVLM do, which leave out a string without a word."""
    tokenizer = words(bos=True)
    tokenizer.chat_template = PARTS
    conversation = ({"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"})
    plain, spoken = Encoder(tokenizer, chat=True).encode(["w4", conversation])
    assert plain.tolist() == [5, 14, 2]
    assert spoken.tolist() == [5, 11, 12, 2, 6, 13, 2]


def test_a_template_that_drops_what_a_user_says_is_an_error(words: Words) -> None:
    tokenizer = words(bos=True)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }} {% endfor %}"
    encoder = Encoder(tokenizer, chat=True)
    with pytest.raises(CalibrationError, match="drops what a user says"):
        encoder.encode(["w1"])


def test_what_a_template_takes_out_of_a_text_is_no_loss(words: Words) -> None:
    tokenizer = words(bos=True)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['content'] is string %}{{ m['content'].replace('w9', '') | trim }} "
        "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    assert Encoder(tokenizer, chat=True).encode([" w1 w9"])[0].tolist() == [11]
