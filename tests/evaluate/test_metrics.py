"""The metrics against their definitions, written out in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tests.conftest import tiny_llama, tiny_tokenizer
from tokenizers import processors
from torch import Tensor
from transformers import LlamaForCausalLM

from auto_round.errors import SpecError
from auto_round.evaluate import metrics
from auto_round.evaluate.metrics import compare, evaluate_tokens, greedy, held_out_text, perplexity, tally


def near(model: LlamaForCausalLM, noise: float) -> LlamaForCausalLM:
    """A copy with a perturbed head."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight += noise * torch.randn(
            other.lm_head.weight.shape, generator=torch.Generator().manual_seed(3)
        )
    return other


@torch.no_grad()
def log_probs(model: LlamaForCausalLM, tokens: Tensor) -> Tensor:
    return torch.log_softmax(model(tokens).logits[:, :-1].double(), -1)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_compare_is_the_definition(tokens: Tensor, batch_size: int) -> None:
    reference = tiny_llama()
    model = near(reference, 0.05)
    p, q, targets = log_probs(reference, tokens), log_probs(model, tokens), tokens[:, 1:, None]
    measured = compare(reference, model, tokens, batch_size)
    assert measured.tokens == 8 * 31
    assert measured.perplexity_reference == pytest.approx(math.exp(-p.gather(2, targets).mean()), rel=1e-5)
    assert measured.perplexity == pytest.approx(math.exp(-q.gather(2, targets).mean()), rel=1e-5)
    assert measured.kl_divergence == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    agreement = float((p.argmax(-1) == q.argmax(-1)).double().mean())
    assert 0 < agreement < 1
    assert measured.top1_agreement == pytest.approx(agreement)
    assert measured.perplexity == pytest.approx(perplexity(model, tokens, batch_size), rel=1e-9)


def test_perplexity_is_exp_of_the_loss_of_transformers(tokens: Tensor) -> None:
    model = tiny_llama()
    with torch.no_grad():
        loss = model(tokens, labels=tokens).loss
    assert perplexity(model, tokens, 8) == pytest.approx(math.exp(loss), rel=1e-5)


def test_a_model_is_at_no_distance_from_itself_and_farther_with_more_noise(tokens: Tensor) -> None:
    model = tiny_llama()
    same = compare(model, model, tokens)
    assert (same.kl_divergence, same.top1_agreement) == (0.0, 1.0)
    some, more = (compare(model, near(model, noise), tokens).kl_divergence for noise in (0.01, 0.1))
    assert 0 < some < more


def test_the_reference_is_the_weight_of_the_divergence(tokens: Tensor) -> None:
    reference = tiny_llama()
    model = near(reference, 0.3)
    forward, backward = compare(reference, model, tokens), compare(model, reference, tokens)
    assert forward.kl_divergence != pytest.approx(backward.kl_divergence, rel=1e-3)


@pytest.mark.parametrize("at_once", [1, 7, 1000])
def test_parts_add_up(at_once: int) -> None:
    generator = torch.Generator().manual_seed(0)
    reference, logits = torch.randn(2, 50, 11, generator=generator, dtype=torch.float32).unbind()
    targets = torch.randint(0, 11, (50,), generator=generator)
    whole, parts = tally(reference, logits, targets), tally(reference, logits, targets, at_once)
    assert (whole.agreements, whole.positions) == (parts.agreements, 50)
    assert parts.kl == pytest.approx(whole.kl, rel=1e-6)
    assert parts.nll == pytest.approx(whole.nll, rel=1e-6)


def test_log_probabilities_are_taken_in_float32() -> None:
    logits = torch.tensor([[20.0, 0.0, -3.0]], dtype=torch.bfloat16)
    assert metrics.log_probabilities(logits).dtype == torch.float32
    assert metrics.nll(metrics.log_probabilities(logits), torch.tensor([2])) == pytest.approx(23.0, rel=1e-6)


def test_a_token_ruled_out_by_both_adds_nothing() -> None:
    reference = torch.log_softmax(torch.tensor([[1.0, 2.0, -math.inf]]), -1)
    assert metrics.kl_divergence(reference, reference) == 0.0


@pytest.mark.parametrize("shape", [(0, 8), (2, 1), (8,)])
def test_nothing_to_predict(shape: tuple[int, ...]) -> None:
    with pytest.raises(SpecError, match="at least 2"):
        perplexity(tiny_llama(), torch.ones(shape, dtype=torch.int64))


def test_tokens_are_cut_in_order() -> None:
    tokenizer = tiny_tokenizer()
    rows = evaluate_tokens(tokenizer, "abcdefgh" * 5, 8)
    assert rows.shape == (5, 8)
    assert rows.dtype == torch.int64
    assert tokenizer.decode(rows[4]).replace(" ", "") == "abcdefgh"
    assert evaluate_tokens(tokenizer, "abcdefgh" * 5, 8, limit=2).shape == (2, 8)


def test_every_sample_starts_with_bos_where_the_tokenizer_puts_one() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    rows = evaluate_tokens(tokenizer, "abcdefgh" * 5, 9)
    assert rows.shape == (5, 9)
    assert rows[:, 0].tolist() == [tokenizer.bos_token_id] * 5
    assert tokenizer.decode(rows[4, 1:]).replace(" ", "") == "abcdefgh"


def test_a_text_too_short_is_named() -> None:
    with pytest.raises(SpecError, match="3 tokens"):
        evaluate_tokens(tiny_tokenizer(), "abc", 8)


def test_greedy_takes_the_likeliest_token_and_returns_new_text_only() -> None:
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    model.generation_config.do_sample = True
    model.generation_config.temperature = 5.0
    model.generation_config.eos_token_id = None
    ids = tokenizer("Hello", return_tensors="pt").input_ids
    expected = ids
    with torch.no_grad():
        for _ in range(6):
            expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], dim=1)
    new = tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)
    assert new
    assert greedy(model, tokenizer, "Hello", 6) == new


def test_the_text_is_there_and_long_enough() -> None:
    assert 1400 < len(held_out_text().split()) < 2000
