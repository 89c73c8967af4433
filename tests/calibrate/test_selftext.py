"""Text that the model samples itself is a draw from its distribution, and the same for the same seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.conftest import tiny_llama
from torch import Tensor
from transformers import (
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from auto_round.calibrate.dataset import CalibrationSet
from auto_round.calibrate.selftext import (
    AT_ONCE,
    Beginnings,
    _reserve,
    _Reserved,
    joined,
    out_of_nothing,
    pieces,
    write,
)
from auto_round.errors import CalibrationError

Words = Callable[..., PreTrainedTokenizerFast]
SPECIAL = {0, 1, 2}


def sample_tokens(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    nsamples: int,
    seqlen: int,
    seed: int,
    at_once: int = AT_ONCE,
) -> Tensor:
    return write(model, out_of_nothing(tokenizer, nsamples, seqlen, seed), at_once=at_once)


def continue_samples(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    given: CalibrationSet,
    nsamples: int,
    seed: int,
    at_once: int = AT_ONCE,
) -> Tensor:
    texts = write(model, pieces(tokenizer, given, nsamples, seed), at_once=at_once)
    return joined(texts, given.tokens.shape[1])


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """More tokens than the tokenizer's 1010, as models have."""
    return tiny_llama(vocab_size=1024)


@pytest.mark.parametrize("bos", [True, False])
def test_samples_begin_as_texts_do_and_hold_ordinary_tokens_only(
    model: LlamaForCausalLM, words: Words, bos: bool
) -> None:
    with torch.no_grad():  # an untrained model whose favourites are those that must not come
        biased = tiny_llama(vocab_size=1024)
        biased.lm_head.weight[[2, 1020]] *= 50
    tokens = sample_tokens(biased, words(bos=bos), 5, 24, seed=3, at_once=50)
    assert tokens.shape == (5, 24)
    assert tokens.dtype == torch.int64
    assert (tokens[:, 0] == 1).tolist() == [bos] * 5
    text = tokens[:, 1:] if bos else tokens
    assert not SPECIAL & set(text.flatten().tolist())
    assert int(text.max()) < 1010
    assert len(set(text[:, 0].tolist())) > 1


def test_the_seed_alone_decides(model: LlamaForCausalLM, words: Words) -> None:
    tokenizer = words(bos=True)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = sample_tokens(model, tokenizer, 3, 16, seed=5)
    assert torch.get_rng_state().equal(state)
    torch.manual_seed(1)
    assert sample_tokens(model, tokenizer, 3, 16, seed=5).equal(first)
    assert sample_tokens(model, tokenizer, 3, 16, seed=6)[:, 1].tolist() != first[:, 1].tolist()


def test_the_likeliest_tokens_come_first_as_the_whole_model_has_them(model: LlamaForCausalLM, words: Words) -> None:
    """The cache must not change what the model says: the greedy tokens are those of a forward over everything."""
    tokens = sample_tokens(model, words(bos=True), 4, 12, seed=0)
    with torch.no_grad():
        logits = model(tokens).logits[..., :1010]
    logits[..., list(SPECIAL)] = -torch.inf
    greedy = logits.argmax(-1)[:, :-1] == tokens[:, 1:]  # (samples, tokens - 1)
    assert greedy[:, 1:5].all()
    assert not greedy[:, 5:].all()


@pytest.fixture(scope="module")
def lopsided() -> LlamaForCausalLM:
    """Every place the same: token 20 three times as likely as 21, nothing else at all."""
    model = tiny_llama(vocab_size=1010)
    with torch.no_grad():
        model.model.norm.weight.zero_()
        model.lm_head = torch.nn.Linear(96, 1010)
        model.lm_head.bias.fill_(-1e4)
        model.lm_head.bias[20], model.lm_head.bias[21] = torch.tensor(3.0).log(), 0.0
    return model


def test_draws_follow_the_models_distribution(lopsided: LlamaForCausalLM, words: Words) -> None:
    drawn = sample_tokens(lopsided, words(bos=True), 16, 60, seed=1)[:, 6:]
    assert set(drawn.flatten().tolist()) == {20, 21}
    assert 0.70 < float((drawn == 20).float().mean()) < 0.80
    assert not sample_tokens(lopsided, words(bos=True), 16, 60, seed=2)[:, 6:].equal(drawn)


def test_draws_from_all_parts_of_a_vocabulary(words: Words) -> None:
    """Likely and unlikely tokens all over a vocabulary that does not end with a whole part."""
    shares = torch.zeros(1010)
    shares[[20, 255, 256, 600, 900, 1009]] = torch.tensor([0.3, 0.05, 0.2, 0.1, 0.25, 0.1])
    model = tiny_llama(vocab_size=1010)
    with torch.no_grad():
        model.model.norm.weight.zero_()
        model.lm_head = torch.nn.Linear(96, 1010)
        model.lm_head.bias.copy_(shares.log().clamp_min(-1e4))
    drawn = sample_tokens(model, words(bos=True), 64, 66, seed=1)[:, 6:]
    found = torch.bincount(drawn.flatten(), minlength=1010) / drawn.numel()
    assert (found - shares).abs().max() < 4 * (0.25 / drawn.numel()) ** 0.5  # four standard deviations
    assert not found[shares == 0].any()


def test_the_model_is_left_as_it_was_and_the_tokens_can_train(model: LlamaForCausalLM, words: Words) -> None:
    model.train()
    try:
        tokens = sample_tokens(model, words(bos=True), 2, 8, seed=0)
        assert model.training
    finally:
        model.eval()
    assert not tokens.is_inference()
    model(tokens, labels=tokens).loss.backward()
    assert model.lm_head.weight.grad is not None
    model.zero_grad()


def filled(tokens: Tensor) -> DynamicCache:
    """A cache whose one layer has seen `tokens` (batch, heads, tokens, width), values being twice the keys."""
    cache = DynamicCache()
    cache.update(tokens, 2 * tokens, 0)
    return cache


def test_a_cache_with_room_adds_tokens_without_copying_the_others() -> None:
    first, *tokens = torch.randn(2, 3, 7, 4).split([3, 1, 2, 1], 2)
    cache = filled(first)
    _reserve(cache, 6)
    addresses = set()
    for number, token in enumerate(tokens, 1):
        keys, values = cache.update(token, 2 * token, 0)
        assert keys.equal(torch.cat([first, *tokens[:number]], 2))
        assert values.equal(2 * keys)
        assert cache.get_seq_length() == keys.shape[2]
        addresses.add((keys.data_ptr(), values.data_ptr()))
    assert len(addresses) == 2  # the last token finds no room
    assert not addresses & {(first.data_ptr(), first.data_ptr())}


def test_a_cache_whose_texts_change_places_goes_on_with_them() -> None:
    first, one, other = torch.randn(2, 3, 5, 4).split([3, 1, 1], 2)
    cache = filled(first)
    _reserve(cache, 6)
    cache.update(one, 2 * one, 0)
    cache.reorder_cache(torch.tensor([1, 0]))
    keys, _ = cache.update(other, 2 * other, 0)
    assert keys.equal(torch.cat([first.flip(0), one.flip(0), other], 2))


def test_layers_whose_window_slides_stay_as_they_are(words: Words) -> None:
    """The window is full while the model writes; tokens are those of forwards over everything."""
    torch.manual_seed(0)
    kinds = ["sliding_attention", "full_attention"]
    config = Gemma3TextConfig(
        vocab_size=1010,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=4,
        layer_types=kinds,
    )
    model = Gemma3ForCausalLM(config).eval()
    begin = replace(out_of_nothing(words(bos=True), 3, 14, seed=0), likeliest=12)
    tokens = write(model, begin)
    with torch.no_grad():
        logits = model(tokens).logits[..., :1010]
    logits[..., list(SPECIAL)] = -torch.inf
    assert logits.argmax(-1)[:, 1:-1].equal(tokens[:, 2:])
    cache = model(tokens, use_cache=True).past_key_values
    _reserve(cache, 20)
    assert [isinstance(layer, _Reserved) for layer in cache.layers] == [False, True]


def test_a_sample_can_be_shorter_than_its_beginning(model: LlamaForCausalLM, words: Words) -> None:
    assert sample_tokens(model, words(bos=True), 2, 1, seed=0).tolist() == [[1], [1]]


def test_a_model_of_nan_is_an_error(words: Words) -> None:
    model = tiny_llama(vocab_size=1010)
    with torch.no_grad():
        model.lm_head.weight[5, 5] = torch.nan
    with pytest.raises(CalibrationError, match=r"not finite"):
        sample_tokens(model, words(bos=True), 2, 8, seed=0)


def test_tokens_that_the_model_rules_out_are_never_drawn(words: Words) -> None:
    model = tiny_llama(vocab_size=1010)
    model.lm_head.register_forward_hook(
        lambda module, args, output: output.index_fill(-1, torch.arange(500), -torch.inf)
    )
    drawn = sample_tokens(model, words(bos=True), 2, 8, seed=0)
    assert (drawn[:, 2:] >= 500).all()


def given(rows: int = 2, length: int = 220) -> CalibrationSet:
    """Samples of tokens that stand in no other place, behind <s>; the last has only 200 real ones."""
    tokens = 10 + torch.arange(rows * length).reshape(rows, length)
    tokens[:, 0] = 1
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[-1, 200:] = False
    return CalibrationSet(tokens, mask, "given")


def places(samples: CalibrationSet, stretches: Tensor, width: int) -> list[int]:
    """Where in the sample of every stretch, 4 for each sample in turn, its `width` tokens behind <s> stand."""
    found = []
    for number, stretch in enumerate(stretches):
        row = number // 4 % len(samples.tokens)
        at = int((samples.tokens[row] == stretch[1]).nonzero())
        assert stretch[0] == 1
        assert stretch[1 : width + 1].equal(samples.tokens[row, at : at + width])
        assert samples.mask[row, at : at + width].all()
        assert not stretch[width + 1 :].equal(samples.tokens[row, at + width : at + len(stretch) - 1])
        found.append(at)
    return found


def test_the_model_goes_on_from_pieces_of_all_samples(model: LlamaForCausalLM, words: Words) -> None:
    samples = given()
    tokens = continue_samples(model, words(bos=True), samples, 6, seed=4, at_once=300)
    assert tokens.shape == (6, 220)
    begins = places(samples, tokens.reshape(24, 55), 13)
    assert min(begins) >= 1
    assert len(set(begins)) > 12
    assert not SPECIAL - {1} & set(tokens.flatten().tolist())
    assert len({tuple(stretch[14:].tolist()) for stretch in tokens.reshape(24, 55)}) == 24


def test_what_the_model_goes_on_with_is_drawn_from_what_it_makes_of_the_piece(
    lopsided: LlamaForCausalLM, words: Words
) -> None:
    drawn = continue_samples(lopsided, words(bos=True), given(4), 16, seed=1).reshape(64, 55)[:, 14:]
    assert set(drawn.flatten().tolist()) == {20, 21}
    assert 0.70 < float((drawn == 20).float().mean()) < 0.80


def test_the_same_seed_goes_on_in_the_same_way(model: LlamaForCausalLM, words: Words) -> None:
    first, again, other = (continue_samples(model, words(bos=False), given(), 3, seed=seed) for seed in (5, 5, 6))
    assert first.equal(again)
    assert not first[:, :13].equal(other[:, :13])


def test_samples_too_short_for_a_piece_are_passed_over(model: LlamaForCausalLM, words: Words) -> None:
    samples = given()
    samples.mask[0, 12:] = False
    long = replace(samples, tokens=samples.tokens[1:], mask=samples.mask[1:])
    places(long, continue_samples(model, words(bos=True), samples, 2, seed=0).reshape(8, 55), 13)


def test_pieces_are_a_quarter_of_the_shortest_sample_when_all_are_short(model: LlamaForCausalLM, words: Words) -> None:
    samples = given()
    samples.mask[:, 12:] = False
    places(samples, continue_samples(model, words(bos=True), samples, 2, seed=0).reshape(8, 55), 3)


def test_widths_that_stretches_do_not_divide_are_kept(model: LlamaForCausalLM, words: Words) -> None:
    assert continue_samples(model, words(bos=True), given(2, 210), 2, seed=0).shape == (2, 210)
    one = CalibrationSet(torch.tensor([[7]]), torch.tensor([[True]]), "given")
    assert continue_samples(model, words(bos=False), one, 2, seed=0).tolist() == [[7], [7]]


def test_only_the_last_logits_are_made_where_the_model_can(model: LlamaForCausalLM, words: Words) -> None:
    seen: list[int] = []
    hook = model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    continue_samples(model, words(bos=True), given(), 2, seed=0)
    hook.remove()
    assert set(seen) == {1}


class Old(torch.nn.Module):
    """A model as transformers had them before 5.23, when it knew the cache by another name."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, past_key_values: Any = None, use_cache: bool = False) -> SimpleNamespace:
        output = self.model(input_ids=input_ids, cache=past_key_values, use_cache=use_cache)
        return SimpleNamespace(logits=output.logits, past_key_values=output.cache)


@pytest.mark.filterwarnings("error::FutureWarning")
def test_the_cache_goes_by_the_name_that_the_model_knows(model: LlamaForCausalLM, words: Words) -> None:
    now, before = (sample_tokens(known, words(bos=True), 2, 12, seed=0) for known in (model, Old(model)))
    assert now.equal(before)


def test_what_is_told_is_every_round_and_the_texts_that_are_finished(model: LlamaForCausalLM, words: Words) -> None:
    tokenizer = words(bos=True)
    heard: list[tuple[int, int, Tensor]] = []
    begin = out_of_nothing(tokenizer, 5, 9, seed=2)
    texts = write(model, begin, told=lambda *facts: heard.append(facts), at_once=20)
    assert [done for done, _, _ in heard] == list(range(1, 22))  # 7 tokens behind 2, three times
    assert {total for _, total, _ in heard} == {21}
    assert [len(finished) for _, _, finished in heard] == [0] * 6 + [2] * 7 + [4] * 7 + [5]
    assert all(finished.equal(texts[: len(finished)]) for _, _, finished in heard)


@pytest.mark.parametrize("known", [2, 4, 5])
def test_texts_that_are_known_are_not_written_again(model: LlamaForCausalLM, words: Words, known: int) -> None:
    tokenizer = words(bos=True)
    begin = out_of_nothing(tokenizer, 5, 9, seed=2)
    texts = write(model, begin, at_once=20)
    rounds: list[int] = []
    again = write(model, begin, texts[:known], lambda done, total, _: rounds.append(done), at_once=20)
    assert again.equal(texts)
    assert min(rounds, default=22) == {2: 8, 4: 15, 5: 22}[known]


def test_texts_written_in_turn_differ(lopsided: LlamaForCausalLM) -> None:
    """Equal beginnings, one text at a time: each draws for itself."""
    begin = Beginnings(torch.ones(4, 1, dtype=torch.int64), 40, 0, torch.arange(3, 1010), seed=0)
    texts = write(lopsided, begin, at_once=40)
    assert len({tuple(text) for text in texts.tolist()}) == 4


def test_the_digest_tells_all_that_decides_the_texts() -> None:
    tokens, ordinary = torch.arange(6).reshape(2, 3), torch.arange(3, 9)
    begin = Beginnings(tokens, 9, 0, ordinary, 1)
    others = (
        Beginnings(tokens.reshape(3, 2), 9, 0, ordinary, 1),
        Beginnings(tokens + 1, 9, 0, ordinary, 1),
        Beginnings(tokens, 8, 0, ordinary, 1),
        Beginnings(tokens, 9, 4, ordinary, 1),
        Beginnings(tokens, 9, 0, ordinary[1:], 1),
        Beginnings(tokens, 9, 0, ordinary, 2),
    )
    assert Beginnings(tokens.clone(), 9, 0, ordinary.clone(), 1).digest == begin.digest
    assert len({begin.digest, *(other.digest for other in others)}) == 7
