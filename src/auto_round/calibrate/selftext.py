"""Calibration text that the model samples itself, so that none has to be found: the idea of LLM-QAT (arXiv 2305.17888).

Each sample begins with what the tokenizer puts in front of a text and one ordinary token drawn evenly from the
vocabulary; the next few tokens are the likeliest ones, so that text settles into a language, and the rest are drawn
from the model's own distribution.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from auto_round.calibrate.text import Encoder
from auto_round.errors import CalibrationError

_LIKELIEST = 4


def sample_tokens(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    nsamples: int,
    seqlen: int,
    seed: int,
    batch_size: int = 8,
) -> Tensor:
    """Return (nsamples, seqlen) int64 token ids on the CPU, the same for the same seed and machine.

    Special tokens are never drawn: a text that has ended would fill its sample with the end. Raises CalibrationError
    when the model's output is not finite.
    """
    lead = Encoder(tokenizer).lead
    device = next(model.parameters()).device
    # The model may know more tokens than its tokenizer, and special ones are not text.
    ordinary = sorted(set(range(len(tokenizer))) - _special(tokenizer))
    starts = sorted(set(ordinary) - set(tokenizer.added_tokens_decoder))
    if not starts:
        raise CalibrationError("the tokenizer has no ordinary tokens that text could start with")
    generator = torch.Generator(device).manual_seed(seed)
    first = torch.tensor(starts)[torch.randint(len(starts), (nsamples,), generator=torch.Generator().manual_seed(seed))]
    begin = torch.cat([lead.expand(nsamples, -1), first[:, None]], 1)[:, :seqlen]  # (nsamples, lead + 1)
    # Allocated outside inference mode: tokens made inside could not be used in training.
    tokens = torch.empty(nsamples, seqlen, dtype=torch.int64)
    training = model.training
    model.eval()
    try:
        for at in range(0, nsamples, batch_size):
            rows = slice(at, at + batch_size)
            _continue(model, begin[rows].to(device), tokens[rows], ordinary, generator)
    finally:
        model.train(training)
    return tokens


def _special(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


@torch.inference_mode()
def _continue(model: nn.Module, begin: Tensor, tokens: Tensor, ordinary: list[int], generator: torch.Generator) -> None:
    """Fill tokens (batch, seqlen) with `begin` (batch, few) and what the model makes of it."""
    filled = begin.shape[1]
    tokens[:, :filled] = begin.to(tokens.device)
    allowed: Tensor | None = None
    current, cache = begin, None
    for place in range(filled, tokens.shape[1]):
        output = model(input_ids=current, past_key_values=cache, use_cache=True)
        logits, cache = output.logits[:, -1].float(), output.past_key_values  # (batch, vocabulary)
        if not torch.isfinite(logits).all():
            raise CalibrationError("the model's output is not finite; text cannot be sampled from it")
        if allowed is None:
            allowed = torch.full_like(logits[0], -torch.inf)  # (vocabulary,)
            allowed[torch.tensor(ordinary, device=logits.device)] = 0
        logits = logits + allowed
        if place >= filled + _LIKELIEST:
            # The largest of probability / Exp(1) noise is a draw from the probabilities; unlike a running sum over
            # the vocabulary it is the same on every run on an accelerator.
            noise = torch.empty_like(logits).exponential_(generator=generator)
            logits = logits.softmax(-1) / noise
        current = logits.argmax(-1, keepdim=True)  # (batch, 1)
        tokens[:, place] = current[:, 0].to(tokens.device)
