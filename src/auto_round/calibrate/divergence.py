"""KL divergence of the next token's distribution from the original's, for hidden states behind the last block."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from auto_round.calibrate.capture import logits_of
from auto_round.source.skeleton import Skeleton

AT_ONCE = 32  # tokens whose logits are there at once: enough to use a head's weights well, few enough to stay small
SHARE = 0.25  # of a sample's tokens that one step sees: a head can be larger than its block

Logits = Callable[[slice], Tensor]  # positions -> logits (batch, positions, vocabulary)


def kl_divergence(original: Logits, found: Logits, weights: Tensor) -> Tensor:
    """Sum over the tokens of their weight (batch, tokens) times KL(original || found), float32.

    Logits are asked for a part of the tokens at a time. Where those of `found` have a graph, it is run backwards.
    """
    total, width = torch.zeros((), device=weights.device), max(1, AT_ONCE // len(weights))
    for begin in range(0, weights.shape[1], width):
        tokens = slice(begin, min(begin + width, weights.shape[1]))
        with torch.no_grad():
            expected = original(tokens).float().log_softmax(-1)
        logits = found(tokens)
        got, share = logits.detach().float().log_softmax(-1), weights[:, tokens, None]
        difference = expected - got
        likely = expected.exp_()
        total += (difference.mul_(likely).sum(-1, keepdim=True) * share).sum()
        if logits.requires_grad:
            # The gradient of KL(p || softmax(z)) in z is softmax(z) - p.
            logits.backward(got.exp_().sub_(likely).mul_(share).to(logits.dtype))
    return total


class TokenLoss:
    """Loss of the last block by what comes of it: the KL divergence of the tokens, instead of a square error.

    Everything outside the blocks must be loaded, see `behind_blocks`. With a gradient it draws some of the tokens anew
    at each call and scales the sum up to all of them.
    """

    def __init__(
        self, skeleton: Skeleton, block_names: Sequence[str], tokens: Tensor, generator: torch.Generator
    ) -> None:
        """tokens: (samples, tokens) int64, those of all samples. generator: draws the tokens that a step sees."""
        self._skeleton, self._names, self._tokens, self._generator = skeleton, block_names, tokens, generator

    def __call__(self, output: Tensor, target: Tensor, weights: Tensor, rows: Tensor) -> Tensor:
        """Sum over tokens of weights (batch, tokens) times KL(original || quantised), with a graph if `output` has one.

        output, target: (batch, tokens, hidden) behind the last block for the samples `rows` int64, quantised and
        original. Raises NoLogitsError, see `logits_of`.
        """
        ids = self._tokens[rows.to(self._tokens.device)].to(output.device)
        final, whole = output.detach(), weights
        if output.requires_grad:
            count = max(1, round(SHARE * ids.shape[1]))
            chosen = torch.randperm(ids.shape[1], generator=self._generator)[:count].sort().values.to(output.device)
            final, target, weights, ids = final[:, chosen], target[:, chosen], weights[:, chosen], ids[:, chosen]
            final.requires_grad_(True)
        model, names = self._skeleton.model, self._names
        total = kl_divergence(
            lambda part: logits_of(model, names, ids[:, part], target[:, part]),
            lambda part: logits_of(model, names, ids[:, part], final[:, part]),
            weights,
        )
        if not output.requires_grad:
            return total
        assert final.grad is not None
        scale = whole.sum() / weights.sum().clamp_min(1e-9)
        # A term that is 0 and whose gradient in `output` is the one found already.
        picked = output[:, chosen].float()
        return scale * (total + ((picked - picked.detach()) * final.grad.float()).sum())
