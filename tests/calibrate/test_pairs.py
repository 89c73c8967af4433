"""Mappings as a calibration set: lists or tensors, padded or not, images of one size or of several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from auto_round.calibrate.dataset import CalibrationSet
from auto_round.calibrate.pairs import from_pairs
from auto_round.errors import CalibrationError


@pytest.fixture
def made(heard: Any) -> Callable[..., CalibrationSet]:
    def make(*pairs: Mapping[str, Any], processor: Any = None) -> CalibrationSet:
        return from_pairs(pairs, processor, nsamples=8, seqlen=32, listener=heard)

    return make


def test_what_a_tokenizer_returns_are_samples(
    made: Callable[..., CalibrationSet], words: Callable[..., PreTrainedTokenizerFast]
) -> None:
    tokenizer = words(bos=True)
    built = made(*(tokenizer(text) for text in ("w1 w2 w3", "w4")))
    assert built.tokens.tolist() == [[1, 11, 12, 13], [1, 14, 0, 0]]
    assert built.mask.tolist() == [[True] * 4, [True, True, False, False]]
    assert (built.beside, built.source) == ((), "token ids that were given")
    tensors = made(*(tokenizer(text, return_tensors="pt") for text in ("w1 w2 w3", "w4")))
    assert tensors.digest == built.digest


def test_lists_and_arrays_beside_the_ids_are_kept(made: Callable[..., CalibrationSet]) -> None:
    built = made({"input_ids": [[5, 6]], "kinds": [[0, 1]], "pixels": np.ones((1, 3)), "text": "left out"})
    (beside,) = built.beside
    assert beside["kinds"].tolist() == [[0, 1]]
    assert beside["pixels"].shape == (1, 3)
    assert sorted(beside) == ["kinds", "pixels"]


@pytest.mark.parametrize("mask", [[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [0, 1, 1, 1, 0]])
def test_padding_is_cut_off_at_either_end(made: Callable[..., CalibrationSet], mask: Sequence[int]) -> None:
    begin = mask.index(1)
    ids, kinds = torch.full((1, 5), 3), torch.full((1, 5), 9)
    ids[0, begin : begin + 3] = torch.tensor([11, 12, 13])
    kinds[0, begin : begin + 3] = torch.tensor([0, 1, 0])
    built = made({"input_ids": ids, "attention_mask": torch.tensor([mask]), "kinds": kinds, "pixels": torch.ones(1, 5)})
    assert built.tokens.tolist() == [[11, 12, 13]]
    assert built.mask.all()
    assert built.beside[0]["kinds"].tolist() == [[0, 1, 0]]
    assert built.beside[0]["pixels"].shape == (1, 5)  # floats are no entries of tokens


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ({"input_ids": [5, 6, 7], "attention_mask": [1, 0, 1]}, "attention_mask of pair 0 leaves 2 of 3 tokens"),
        ({"input_ids": [5, 6], "attention_mask": [0, 0]}, "leaves 0 of 2 tokens"),
        ({"input_ids": [5, 6], "attention_mask": [1]}, r"attention_mask of shape \(1, 1\); expected .* \(1, 2\)"),
        ({"input_ids": [0.5, 6]}, r"input_ids of torch.float32 \(1, 2\); expected \(1, tokens\) whole"),
        ({"input_ids": [[5, 6], [7, 8]]}, r"input_ids of torch.int64 \(2, 2\)"),
        ({"input_ids": [[5, 6], [7]]}, "input_ids of pair 0 makes no tensor"),
        ({"input_ids": [5], "pixels": [torch.ones(2), torch.ones(3)]}, "pixels of pair 0 makes no tensor"),
        ({"input_ids": None}, "pair 0 has no input_ids, only input_ids"),
    ],
)
def test_what_is_no_sample_is_refused(
    made: Callable[..., CalibrationSet], pair: Mapping[str, Any], message: str
) -> None:
    with pytest.raises(CalibrationError, match=message):
        made(pair)


def test_a_processor_without_ids_is_refused(made: Callable[..., CalibrationSet]) -> None:
    with pytest.raises(CalibrationError, match="pair 0 has no input_ids, only pixel_values"):
        made({"images": "a picture"}, processor=lambda **arguments: {"pixel_values": torch.ones(1)})
