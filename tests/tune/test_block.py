"""What a block's loss is made of."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from auto_round.spec.recipe import Recipe
from auto_round.spec.scheme import Scheme
from auto_round.tune.block import Activations, BlockTask, square_error, token_weights, tune_block


def sized(*sizes: float) -> Tensor:
    """Targets (1, tokens, 3) whose tokens have these mean squares."""
    return torch.tensor(sizes).sqrt()[None, :, None].expand(1, -1, 3)


def test_a_massive_token_counts_as_one_of_four_medians() -> None:
    weights = token_weights(sized(1, 2, 2, 3, 8, 8000), None)
    torch.testing.assert_close(weights, torch.tensor([[1, 1, 1, 1, 1, 1e-3]]))


def test_padding_counts_nothing_and_moves_no_median() -> None:
    mask = torch.tensor([[False, False, True, True, True]])
    weights = token_weights(sized(1e6, 1e6, 1, 1, 8), mask)
    torch.testing.assert_close(weights, torch.tensor([[0, 0, 1, 1, 0.5]]))


def test_tokens_without_a_size_count_as_they_are() -> None:
    assert token_weights(sized(0, 0, 0, 5), None).tolist() == [[1, 1, 1, 1]]


def test_the_loss_is_a_plain_square_error_where_all_tokens_count_the_same() -> None:
    output, target = torch.randn(2, 2, 5, 3, 4, generator=torch.Generator().manual_seed(0))
    found = square_error(output, target, torch.ones(2, 5))
    torch.testing.assert_close(found, (output - target).square().mean((2, 3)).sum())


def test_gradients_too_small_for_float16_still_move_codes() -> None:
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(64, 64, bias=False, dtype=torch.float16).requires_grad_(False)
    weight = torch.randn(64, 64, generator=generator)
    inputs = 3e-4 * torch.randn(16, 2048, 16, generator=generator) @ torch.randn(16, 64, generator=generator)
    task = BlockTask(lambda hidden, _: linear(hidden), {"a": linear}, {"a": weight}, {"a": Scheme(2, 32)})
    activations = Activations.of(inputs.half(), (inputs @ weight.t()).half(), None)
    rng = torch.Generator().manual_seed(1)
    recipe = Recipe(iters=20, batch_size=8, start="plain")
    tuned = tune_block(task, activations, recipe, rng, torch.device("cpu"), lambda *_: None)
    assert tuned.loss_end < 0.5 * tuned.loss_start


@pytest.mark.parametrize("bits", [2, 4])
def test_a_massive_token_out_of_reach_does_not_rule_the_others(bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(64, 64, bias=False).requires_grad_(False)
    weight = torch.randn(64, 64, generator=generator)
    inputs = torch.randn(16, 8, 16, generator=generator) @ torch.randn(16, 64, generator=generator)
    targets = inputs @ weight.t()
    targets[:, 0] += 1000 * torch.randn(64, generator=generator)  # no weights give that
    task = BlockTask(lambda hidden, _: linear(hidden), {"a": linear}, {"a": weight}, {"a": Scheme(bits, 32)})
    whole = Activations.of(inputs, targets, None)

    def others(activations: Activations) -> float:
        recipe = Recipe(iters=40, batch_size=4, start="search")
        rng = torch.Generator().manual_seed(1)
        tuned = tune_block(task, activations, recipe, rng, torch.device("cpu"), lambda *_: None)
        linear.weight.data.copy_(tuned.tensors["a"].dequantize())
        return float((linear(inputs) - targets)[:, 1:].square().mean())

    assert others(whole) < 0.9 * others(replace(whole, weights=torch.ones(16, 8)))


@pytest.mark.parametrize(("given", "observed"), [(12, 12), (8, 8), (6, 8), (4, 8), (1, 8)])
@pytest.mark.parametrize("at_once", [4, 2, 1])
def test_moments_are_of_given_samples_and_of_written_ones_only_while_tokens_are_few(
    given: int, observed: int, at_once: int
) -> None:
    """16 inputs, 20 tokens a sample: 8 samples hold ten tokens for each input."""
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(16, 32, bias=False).requires_grad_(False)
    weight = torch.randn(32, 16, generator=generator)
    inputs = torch.randn(12, 20, 16, generator=generator) @ torch.randn(16, 16, generator=generator)
    task = BlockTask(lambda hidden, _: linear(hidden), {"a": linear}, {"a": weight}, {"a": Scheme(2, 16)})

    def started(samples: int, written: int, at_once: int) -> Tensor:
        seen = inputs[:samples]
        activations = Activations.of(seen, seen @ weight.t(), None)
        recipe = Recipe(
            iters=0, batch_size=at_once, gradient_accumulate_steps=4 // at_once, nsamples=128, self_nsamples=written
        )
        rng = torch.Generator().manual_seed(1)
        tuned = tune_block(task, activations, recipe, rng, torch.device("cpu"), lambda *_: None)
        return tuned.tensors["a"].dequantize()

    expected = started(observed, 0, 4)
    torch.testing.assert_close(started(12, 12 - given, at_once), expected)
    assert observed == 12 or not expected.equal(started(12, 0, 4))
