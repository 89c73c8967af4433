"""The one way to a calibration set, from every kind of description."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from auto_round.calibrate.dataset import CalibrationSet, build_calibration
from auto_round.errors import CalibrationError

Words = Callable[..., PreTrainedTokenizerFast]


def lines(first: int, count: int = 12) -> list[str]:
    """Texts of 32 words, all of them between w<first> and w<first + 99>."""
    return [" ".join(f"w{first + (7 * n + i) % 100}" for i in range(32)) for n in range(count)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, first in (("a, b.jsonl", 0), ("c.jsonl", 100), ("d.jsonl", 200)):
        Path(name).write_text("\n".join(json.dumps({"text": text}) for text in lines(first)))
    return tmp_path


def hundreds(built: CalibrationSet) -> list[int]:
    """For every sample, the hundred that its words come from."""
    return [int(row[-1] - 10) // 100 for row in built.tokens]


@pytest.fixture
def build(words: Words, heard: Any) -> Callable[..., CalibrationSet]:
    def call(dataset: Any, **changes: Any) -> CalibrationSet:
        tokenizer = changes.pop("tokenizer", words(bos=True))
        values = {"nsamples": 4, "seqlen": 16, "seed": 3, "listener": heard, **changes}
        return build_calibration(dataset, tokenizer, **values)

    return call


Build = Callable[..., CalibrationSet]


def test_a_file(build: Build, folder: Path, heard: Any) -> None:
    built = build("a\\, b.jsonl")
    assert built.tokens.shape == (4, 16)
    assert built.mask.all()
    assert built.token_count == 64
    assert built.source == "a, b.jsonl"
    assert built.tokens[:, 0].tolist() == [1] * 4
    assert heard.notes == heard.warnings == []


def test_the_same_arguments_give_the_same_set_and_the_seed_another(build: Build, folder: Path) -> None:
    assert build("c.jsonl").digest == build("c.jsonl").digest
    assert build("c.jsonl").digest != build("c.jsonl", seed=4).digest
    assert build("c.jsonl", nsamples=2).tokens.equal(build("c.jsonl").tokens[:2])


def test_the_digest_is_of_tokens_and_mask() -> None:
    tokens, mask = torch.tensor([[1, 2], [3, 0]]), torch.tensor([[True, True], [True, False]])
    built = CalibrationSet(tokens, mask, "x")
    raw = b"".join(value.to_bytes(8, "little") for value in (1, 2, 3, 0)) + bytes([1, 1, 1, 0])
    assert built.digest == hashlib.sha256(raw).hexdigest()
    assert built.summary() == {"source": "x", "samples": 2, "seqlen": 2, "tokens": 3, "digest": built.digest}


def test_sets_with_num_go_first_and_the_others_share(build: Build, folder: Path) -> None:
    built = build("a\\, b.jsonl,c.jsonl:num=4,d.jsonl", nsamples=11)
    assert built.source == "4 x a, b.jsonl, 4 x c.jsonl, 3 x d.jsonl"
    origins = hundreds(built)
    assert [origins.count(n) for n in range(3)] == [4, 4, 3]
    assert origins != sorted(origins)  # mixed, so that held-out samples come from all sets


def test_num_alone_says_how_many(build: Build, folder: Path, heard: Any) -> None:
    assert build("c.jsonl:num=3", nsamples=128).tokens.shape == (3, 16)
    assert "num= asks for 3 samples in all" in heard.notes[0]
    with pytest.raises(CalibrationError, match=r"num= asks for 5 samples, but there are 4 in all; pass nsamples=5"):
        build("c.jsonl:num=5")
    with pytest.raises(CalibrationError, match=r"for 4 samples and 1 more sets share the rest.*pass nsamples=5"):
        build("c.jsonl:num=4,d.jsonl")
    with pytest.raises(CalibrationError, match=r"c.jsonl gives 12 of the 40 samples"):
        build("c.jsonl:num=40:concat=false", nsamples=40)


def test_the_template_of_one_set_leaves_the_other_alone(build: Build, folder: Path) -> None:
    built = build("c.jsonl:system_prompt=Be kind\\, please,d.jsonl")
    first = {hundred: built.tokens[i, :7].tolist() for i, hundred in enumerate(hundreds(built))}
    assert first[1][:6] == [4, 7, 8, 9, 2, 5]
    assert first[2][0] == 1
    assert first[2][1] >= 210


def test_samples_of_self_are_blank_until_they_are_written(build: Build, folder: Path) -> None:
    assert build("self").blank.all()
    assert build("self").source.startswith("self")
    mixed = build("c.jsonl,self:num=3", nsamples=7)
    assert mixed.blank.sum() == 3
    assert not mixed.blank[:4].logical_not().all()  # mixed, so that held-out samples come from both
    texts = torch.arange(48).reshape(3, 16)
    filled = mixed.filled(texts)
    assert filled.mask.all()
    assert filled.tokens[mixed.blank].equal(texts)
    assert filled.tokens[~mixed.blank].equal(mixed.tokens[~mixed.blank])
    with pytest.raises(CalibrationError, match=r"self takes no option but num=; got self:concat=True"):
        build("self:concat")


def test_a_list_of_texts(build: Build) -> None:
    assert build(lines(0, 4)).source == "a list of 4 texts"
    with pytest.raises(CalibrationError, match=r"a list of 2 texts gives 1 of the 4 samples of 64 tokens"):
        build(["w1 w2 " * 16, "w3 w4 w5 " * 12], seqlen=64)
    with pytest.raises(CalibrationError, match=r"mixes texts"):
        build(["w1", 3])


@pytest.mark.parametrize("tokenizer", [None, "words"])
def test_rows_of_token_ids_are_cut_or_padded_and_masked(build: Build, words: Words, tokenizer: Any) -> None:
    tokenizer = tokenizer and words(bos=True)
    if tokenizer:
        tokenizer.pad_token = "</s>"
    padding = 2 if tokenizer else 0
    built = build([[5, 6, 7], list(range(20, 60)), torch.tensor([8, 9]), [4]], nsamples=3, tokenizer=tokenizer)
    assert built.tokens.tolist() == [
        [5, 6, 7] + [padding] * 13,
        list(range(20, 36)),
        [8, 9] + [padding] * 14,
    ]
    assert built.mask.sum(1).tolist() == [3, 16, 2]
    assert built.mask[0].tolist() == [True] * 3 + [False] * 13
    assert built.token_count == 21


def test_a_tensor_of_token_ids_keeps_its_order_and_width(build: Build) -> None:
    ids = torch.arange(60, dtype=torch.int32).view(6, 10)
    built = build(ids, tokenizer=None)
    assert built.tokens.equal(ids[:4].long())
    assert built.mask.all()


def test_too_few_rows_and_filler(build: Build, heard: Any) -> None:
    rows = [list(range(16)), [7] * 16, list(range(16, 32))]
    with pytest.raises(
        CalibrationError, match=r"2 usable samples of the 4 wanted; pass nsamples=2 .*self_nsamples=2\)"
    ):
        build(rows, tokenizer=None)
    assert "1 samples are dropped" in heard.notes[0]
    assert build(rows, nsamples=2, tokenizer=None).tokens[1, 0] == 16


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("", "the dataset is empty"),
        ([], "the dataset is empty"),
        (torch.zeros(0, 4, dtype=torch.int64), "the dataset is empty"),
        (torch.arange(4), r"shape \(4,\); expected token ids \(samples, tokens\)"),
        ([[1, 2], []], "row 2 of the dataset is"),
        ([[1, 2], [0.5, 1.0]], "row 2 of the dataset is torch.float32"),
        ([[1, 2], {"a": 1}], "row 2 of the dataset is neither text nor token ids"),
        ([[[1, 2]]], r"row 1 of the dataset is torch.int64 \(1, 2\); expected"),
        ({"a": 1}, "dataset is a dict; expected"),
        (7, "dataset is a int; expected"),
        ([[5, 1010]] * 4, "token id 1010; the tokenizer has 0 to 1009"),
        ([[5, -1]] * 4, "token id -1; the tokenizer has 0 to 1009"),
        ("gone.jsonl", "there is no file gone.jsonl"),
    ],
)
def test_bad_input_is_named(build: Build, dataset: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        build(dataset)


def test_text_needs_a_tokenizer(build: Build, folder: Path) -> None:
    for dataset in ("c.jsonl", lines(0)):
        with pytest.raises(CalibrationError, match=r"a tokenizer is needed"):
            build(dataset, tokenizer=None)


def test_an_empty_file(build: Build, folder: Path) -> None:
    Path("empty.jsonl").write_text("\n")
    with pytest.raises(CalibrationError, match=r"empty.jsonl holds no text"):
        build("empty.jsonl")


def test_text_that_the_tokenizer_does_not_know_is_a_warning(build: Build, heard: Any) -> None:
    build(["w1 w2 w3 w4 w5 w6 w7 w8 w9 ? w10 ? w11 w12 ? w13"] * 4)
    assert heard.warnings == []
    build(["w1 ? w2 ? w3 ? w4 ? w5 ? w6 w7 w8 w9 w10 w11 w12"] * 4)
    assert "31% of the calibration tokens from a list of 4 texts are unknown" in heard.warnings[0]


def test_padding_is_not_text_that_the_tokenizer_does_not_know(build: Build, heard: Any) -> None:
    built = build([[11, 12], list(range(20, 36)), [13], [14]])
    assert int((built.tokens == 0).sum()) == 44
    assert heard.warnings == []


def test_no_global_random_state_is_touched(build: Build, folder: Path) -> None:
    import random

    before = torch.get_rng_state().clone(), random.getstate()
    build("c.jsonl,d.jsonl")
    assert torch.get_rng_state().equal(before[0])
    assert random.getstate() == before[1]
