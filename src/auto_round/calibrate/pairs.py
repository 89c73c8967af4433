"""Images with text as a calibration set: samples that the model's processor makes, or has made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import torch
from numpy import ndarray
from torch import Tensor
from torch.nn.functional import pad

from auto_round.calibrate.dataset import CalibrationSet, Dataset
from auto_round.errors import CalibrationError
from auto_round.runtime.events import Listener

IDS, PADDING = "input_ids", "attention_mask"
# Zeros behind an image, or whole images of zeros, are what processors add to make a batch of images of several sizes.
# A model that is told the sizes, or has a mask of pixels, leaves them out again.
PIXELS = ("pixel_values", "pixel_attention_mask")
SIZES = ("image_sizes", "pixel_attention_mask")


def is_pairs(dataset: Dataset) -> TypeGuard[Sequence[Mapping[str, Any]]]:
    """True for a list of mappings, image-text pairs."""
    return isinstance(dataset, (list, tuple)) and len(dataset) > 0 and isinstance(dataset[0], Mapping)


def from_pairs(
    pairs: Sequence[Mapping[str, Any]], processor: Any | None, *, nsamples: int, seqlen: int, listener: Listener
) -> CalibrationSet:
    """Make a set of at most `nsamples` pairs of at most `seqlen` tokens, places of images included.

    pairs: each what a processor or tokenizer returned for one sample (with input_ids, as tensors or lists), or the
    arguments to call it with, such as {"images": image, "text": "<image>What is this?"}. processor: the model's; None
    is enough for the former. Padding is cut off. Longer samples are left out with a warning, since an image cannot be
    cut. Raises CalibrationError when none is left, or when pairs cannot stand in one batch.
    """
    samples = [_sample(pair, processor, number) for number, pair in enumerate(pairs[:nsamples])]
    numbers = [number for number, sample in enumerate(samples) if sample[IDS].shape[1] <= seqlen]
    fitting = [samples[number] for number in numbers]
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
    others = [
        {key: _lengthened(value, sample[IDS].shape[1], length) for key, value in sample.items() if key != IDS}
        for sample in fitting
    ]
    beside = _alike(others, numbers)
    return CalibrationSet(
        tokens=torch.cat([pad(sample[IDS], (0, length - sample[IDS].shape[1])) for sample in fitting]),
        mask=torch.arange(length)[None] < counts,
        source=f"{len(fitting)} image-text pairs" if beside else "token ids that were given",
        beside=beside,
    )


def _sample(pair: Mapping[str, Any], processor: Any | None, number: int) -> dict[str, Tensor]:
    """The tensors of one sample, as a batch of one: input_ids (1, tokens) int64, without padding and its mask."""
    made: Mapping[str, Any] = pair
    if IDS not in pair:
        if processor is None:
            raise CalibrationError("image-text pairs need the model's processor: give processor=, or its outputs")
        try:
            made = processor(**pair, return_tensors="pt")
        except (TypeError, ValueError, KeyError, OSError) as error:
            raise CalibrationError(f"the processor does not take image-text pair {number}: {error}") from None
    tensors = {
        key: _tensor(value, f"{key} of pair {number}")
        for key, value in made.items()
        if isinstance(value, (Tensor, ndarray, list, tuple))
    }
    if IDS not in tensors:
        raise CalibrationError(f"pair {number} has no input_ids, only {', '.join(map(str, made))}")
    if tensors[IDS].dim() == 1:  # a tokenizer's lists, without a dimension of samples
        tensors = {key: value[None] if value.dim() == 1 else value for key, value in tensors.items()}
    ids = tensors[IDS]
    if ids.dim() != 2 or len(ids) != 1 or not ids.numel() or ids.is_floating_point():
        raise CalibrationError(
            f"pair {number} has input_ids of {ids.dtype} {tuple(ids.shape)}; expected (1, tokens) whole numbers"
        )
    return _without_padding({**tensors, IDS: ids.long()}, number)


def _tensor(value: Any, where: str) -> Tensor:
    """On the CPU; CalibrationError for lists that are none, such as those of texts or of images of several sizes."""
    try:
        return torch.as_tensor(value, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise CalibrationError(f"{where} makes no tensor: {error}; leave it out, or give a tensor") from None


def _without_padding(sample: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    """Cut a sample to the tokens that its padding mask leaves, and drop the mask."""
    left = {key: value for key, value in sample.items() if key != PADDING}
    mask, ids = sample.get(PADDING), sample[IDS]
    if mask is None:
        return left
    if mask.shape != ids.shape:
        raise CalibrationError(
            f"pair {number} has an attention_mask of shape {tuple(mask.shape)}; expected that of its input_ids, "
            f"{tuple(ids.shape)}, or none"
        )
    real = mask[0].nonzero().flatten().tolist()
    if not real or len(real) != real[-1] + 1 - real[0]:
        raise CalibrationError(
            f"the attention_mask of pair {number} leaves {len(real)} of {ids.shape[1]} tokens, not one run of them: "
            "padding can stand in front or behind only"
        )
    tokens = ids.shape[1]
    return {key: value[:, real[0] : real[-1] + 1] if _by_token(value, tokens) else value for key, value in left.items()}


def _by_token(value: Tensor, tokens: int) -> bool:
    """True for what has an entry for every token, (1, tokens, ...)."""
    return value.dim() >= 2 and value.shape[:2] == (1, tokens) and not value.is_floating_point()


def _lengthened(value: Tensor, tokens: int, length: int) -> Tensor:
    """Pad what has an entry for every token, (1, tokens, ...), to `length` tokens with zeros."""
    if not _by_token(value, tokens):
        return value
    return pad(value, (*[0] * (2 * (value.dim() - 2)), 0, length - tokens))


def _alike(beside: Sequence[dict[str, Tensor]], numbers: Sequence[int]) -> tuple[dict[str, Tensor], ...]:
    """Bring the pixels of all samples to one shape but for dimension 0, by zeros; empty where there are only tokens.

    Raises CalibrationError naming two of the pairs, `numbers`, where shapes differ and zeros would be seen.
    """
    if not beside[0]:
        return ()
    made = [dict(sample) for sample in beside]
    for key, first in beside[0].items():
        values = [sample[key] for sample in beside]
        odd = next((at for at, value in enumerate(values) if value.shape[1:] != first.shape[1:]), None)
        if odd is None:
            continue
        ignored = key in PIXELS and any(size in beside[0] for size in SIZES)
        if not ignored or any(value.dim() != first.dim() for value in values):
            raise CalibrationError(
                f"image-text pairs {numbers[0]} and {numbers[odd]} have {key} of shapes {tuple(first.shape)} and "
                f"{tuple(values[odd].shape)}, which cannot stand in one batch; give images of one size"
            )
        largest = torch.tensor([value.shape[1:] for value in values]).amax(0).tolist()
        for sample, value in zip(made, values, strict=True):
            missing = [wide - size for wide, size in zip(largest, value.shape[1:], strict=True)]
            sample[key] = pad(value, [side for more in reversed(missing) for side in (0, more)])
    return tuple(made)
