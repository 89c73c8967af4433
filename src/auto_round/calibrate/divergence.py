"""KL divergence of the next token's distribution from the original's, for hidden states behind the last block."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from auto_round.calibrate.capture import logits_of
from auto_round.runtime.rng import generator_for
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

    Everything outside the blocks must be loaded, see `behind_blocks`. A step sees some of the tokens, drawn anew, and
    its sum is scaled up to all of them.
    """

    def __init__(self, skeleton: Skeleton, block_names: Sequence[str], tokens: Tensor, seed: int) -> None:
        """tokens: (samples, tokens) int64, those of all samples. seed: draws the tokens that a step sees."""
        self._skeleton, self._names, self._tokens, self._seed = skeleton, block_names, tokens, seed

    def __call__(
        self, output: Tensor, target: Tensor, weights: Tensor, rows: Tensor, iteration: int | None = None
    ) -> Tensor:
        """Sum over tokens of weights (batch, tokens) times KL(original || quantised).

        output, target: (batch, tokens, hidden) behind the last block for the samples `rows` int64, quantised and
        original. iteration: the step; None to look at all tokens, without a graph. Raises NoLogitsError (`logits_of`).
        """
        ids = self._tokens[rows.to(self._tokens.device)].to(output.device)
        if iteration is None:
            return self._divergence(output, target, weights, ids)
        count, length = max(1, round(SHARE * ids.shape[1])), ids.shape[1]
        chosen = torch.randperm(length, generator=generator_for(self._seed, "tokens", iteration))[:count].sort().values
        chosen = chosen.to(output.device)
        final = output.detach()[:, chosen].requires_grad_(True)
        total = self._divergence(final, target[:, chosen], weights[:, chosen], ids[:, chosen])
        assert final.grad is not None
        scale = length / count  # also where tokens are padding: parts of a step then add up to the whole
        # A term that is 0 and whose gradient in `output` is the one found already.
        picked = output[:, chosen].float()
        return scale * (total + ((picked - picked.detach()) * final.grad.float()).sum())

    def _divergence(self, final: Tensor, target: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        model, names = self._skeleton.model, self._names
        return kl_divergence(
            lambda part: logits_of(model, names, ids[:, part], target[:, part]),
            lambda part: logits_of(model, names, ids[:, part], final[:, part]),
            weights,
        )
