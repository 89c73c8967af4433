"""The loss of the last block: KL divergence of next tokens, a part of the logits at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.conftest import VOCABULARY
from torch import Tensor
from transformers import AutoConfig

from auto_round.calibrate import divergence
from auto_round.calibrate.divergence import TokenLoss, kl_divergence
from auto_round.calibrate.front import behind_blocks
from auto_round.source.checkpoint import Checkpoint
from auto_round.source.skeleton import Skeleton

SHAPE = (2, 6, 16)


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def plain(expected: Tensor, found: Tensor, weights: Tensor) -> Tensor:
    expected, found = expected.log_softmax(-1), found.log_softmax(-1)
    return ((expected.exp() * (expected - found)).sum(-1) * weights).sum()


@pytest.mark.parametrize("at_once", [1, 8, 64])
def test_the_divergence_and_its_gradient_are_the_plain_ones(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence, "AT_ONCE", at_once)
    original, found, again = random(0, *SHAPE), random(1, *SHAPE).requires_grad_(), random(1, *SHAPE).requires_grad_()
    weights = torch.tensor([[1.0, 1, 0.5, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    total = kl_divergence(lambda part: original[:, part], lambda part: found[:, part], weights)
    expected = plain(original, again, weights)
    expected.backward()
    torch.testing.assert_close(total, expected.detach())
    torch.testing.assert_close(found.grad, again.grad)


def test_a_step_sees_some_tokens_and_stands_for_all(llama_folder: Path) -> None:
    skeleton = Skeleton(AutoConfig.from_pretrained(llama_folder), Checkpoint(llama_folder))
    blocks = tuple(f"model.layers.{index}" for index in range(len(skeleton.model.model.layers)))
    width: int = skeleton.model.config.hidden_size
    tokens = torch.randint(3, VOCABULARY, (4, 400), generator=torch.Generator().manual_seed(0))
    loss = TokenLoss(skeleton, blocks, tokens, 0)
    target, rows, weights = 4 * random(2, 4, 400, width), torch.arange(4), torch.ones(4, 400)
    output = target + 0.5 * random(3, 4, 400, width)
    with behind_blocks(skeleton, blocks, torch.float32, torch.device("cpu")):
        whole = loss(output, target, weights, rows)
        step = loss(output.requires_grad_(), target, weights, rows, 5)
        step.backward()
    assert output.grad is not None
    seen = output.grad.abs().sum((0, 2)) > 0
    assert int(seen.sum()) == round(divergence.SHARE * 400)
    assert step.item() == pytest.approx(whole.item(), rel=0.1)
