"""Images with text as a calibration set: samples that the model's processor makes, or has made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.nn.functional import pad

from auto_round.calibrate.dataset import CalibrationSet, Dataset
from auto_round.errors import CalibrationError
from auto_round.runtime.events import Listener

IDS, PADDING = "input_ids", "attention_mask"


def is_pairs(dataset: Dataset) -> TypeGuard[Sequence[Mapping[str, Any]]]:
    """True for a list of mappings, image-text pairs."""
    return isinstance(dataset, (list, tuple)) and len(dataset) > 0 and isinstance(dataset[0], Mapping)


def from_pairs(
    pairs: Sequence[Mapping[str, Any]], processor: Any | None, *, nsamples: int, seqlen: int, listener: Listener
) -> CalibrationSet:
    """Make a set of at most `nsamples` pairs of at most `seqlen` tokens, places of images included.

    pairs: each what a processor returned for one sample (with input_ids), or the arguments to call it with, such as
    {"images": image, "text": "<image>What is this?"}. processor: the model's; None is enough for the former. Longer
    samples are left out with a warning, since an image cannot be cut. Raises CalibrationError when none is left.
    """
    samples = [_sample(pair, processor, number) for number, pair in enumerate(pairs[:nsamples])]
    fitting = [sample for sample in samples if sample[IDS].shape[1] <= seqlen]
    if len(fitting) < len(samples):
        longest = max(sample[IDS].shape[1] for sample in samples)
        listener.warn(f"{len(samples) - len(fitting)} pairs are left out: up to {longest} tokens, seqlen is {seqlen}")
    if not fitting:
        raise CalibrationError(f"no image-text pair fits seqlen={seqlen}; raise it, or give smaller images")
    keys = {frozenset(sample) for sample in fitting}
    if len(keys) > 1:
        raise CalibrationError(f"image-text pairs have different inputs: {' and '.join(map(str, map(sorted, keys)))}")
    length = max(sample[IDS].shape[1] for sample in fitting)
    counts = torch.tensor([[sample[IDS].shape[1]] for sample in fitting])
    beside = tuple(
        {key: _lengthened(value, sample[IDS].shape[1], length) for key, value in sample.items() if key != IDS}
        for sample in fitting
    )
    return CalibrationSet(
        tokens=torch.cat([pad(sample[IDS], (0, length - sample[IDS].shape[1])) for sample in fitting]),
        mask=torch.arange(length)[None] < counts,
        source=f"{len(fitting)} image-text pairs",
        beside=beside,
    )


def _sample(pair: Mapping[str, Any], processor: Any | None, number: int) -> dict[str, Tensor]:
    """The tensors of one sample, as a batch of one, without the padding mask."""
    made: Mapping[str, Any] = pair
    if IDS not in pair:
        if processor is None:
            raise CalibrationError("image-text pairs need the model's processor: give processor=, or its outputs")
        try:
            made = processor(**pair, return_tensors="pt")
        except (TypeError, ValueError, KeyError, OSError) as error:
            raise CalibrationError(f"the processor does not take image-text pair {number}: {error}") from None
    tensors = {key: value for key, value in made.items() if isinstance(value, Tensor) and key != PADDING}
    if tensors[IDS].dim() != 2 or len(tensors[IDS]) != 1:
        raise CalibrationError(
            f"pair {number} has input_ids of shape {tuple(tensors[IDS].shape)}; expected (1, tokens)"
        )
    return tensors


def _lengthened(value: Tensor, tokens: int, length: int) -> Tensor:
    """Pad what has an entry for every token, (1, tokens, ...), to `length` tokens with zeros."""
    if value.dim() < 2 or value.shape[:2] != (1, tokens) or value.is_floating_point():
        return value
    return pad(value, (*[0] * (2 * (value.dim() - 2)), 0, length - tokens))
