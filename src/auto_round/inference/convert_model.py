"""The three functions that transformers calls when it opens a folder with ``quant_method: "auto-round"``.

`AutoRoundQuantizer` of transformers 5.0 to 5.23 imports them by these names from this module; they hand over to
`auto_round.load`. This file alone in `inference` imports upward, since its place is given from outside.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from auto_round.load import convert, finish
from auto_round.runtime.device import resolve_device

# device_map values that leave the choice to accelerate, which fills the best device first
AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")
NOT_COMPUTING = ("cpu", "disk", "meta")


def infer_target_device(device_map: Any = None) -> str:
    """Return the device that a `device_map` computes on.

    A device by name, index or `torch.device` is respected; "auto" means the best device there is; of a dict the first
    device that is not the CPU or a disk, else "cpu". None is "cpu": transformers hands over a default device that
    torch was given as a `device_map`.
    """
    if device_map is None:
        return "cpu"
    if isinstance(device_map, dict):
        devices = [str(resolve_device(d)) for d in device_map.values() if str(d) not in NOT_COMPUTING]
        return next((d for d in devices if d != "cpu"), "cpu")
    if device_map in AUTOMATIC:
        return str(resolve_device("auto"))
    return str(resolve_device(device_map))


def convert_hf_model(model: nn.Module, target_device: str = "cpu") -> tuple[nn.Module, list[str]]:
    """Put quantised layers into `model` (on the meta device, in place); return it and the names of its backends."""
    return convert(model, torch.device(target_device))


def post_init(model: nn.Module, used_backends: list[str]) -> None:
    """Check that every quantised layer was really loaded and make it ready to run."""
    finish(model)
