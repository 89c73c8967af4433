"""A tiny quantised model in every format, made once by plain rounding, and ways to damage it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from auto_round import AutoRound
from auto_round.formats import FORMATS
from auto_round.load import load_qtensors
from auto_round.qtensor import QTensor, plain_g_idx

CODED = [name for name in FORMATS if name != "fake" and ":" not in name]


def quantised(source: Path, folder: Path, formats: str, **settings: Any) -> Path:
    """Round `source` to nearest and write `formats`; groups of 32 divide all its inputs."""
    tuner = AutoRound(
        source, **{"group_size": 32, "recipe": "rtn", "device": "cpu", "compute_dtype": "float32", **settings}
    )
    tuner.quantize_and_save(folder, format=formats)
    return folder


def codes(folder: Path) -> dict[str, QTensor]:
    return dict(load_qtensors(folder))


def same_codes(one: Path, other: Path) -> bool:
    first, second = codes(one), codes(other)
    return first.keys() == second.keys() and all(first[name].same(second[name]) for name in first)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


def reconfigure(folder: Path, **changes: Any) -> None:
    """Change keys of quantization_config; None drops one."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    settings = {**config["quantization_config"], **changes}
    config["quantization_config"] = {key: value for key, value in settings.items() if value is not None}
    file.write_text(json.dumps(config))


def with_act_order(folder: Path) -> dict[str, torch.Tensor]:
    """Give every layer of a GPTQ folder a random g_idx, as activation order does; returns the weights it then has."""
    g = torch.Generator().manual_seed(3)
    weights = {}
    for name, tensor in codes(folder).items():
        g_idx = plain_g_idx(tensor.scheme, tensor.in_features)[torch.randperm(tensor.in_features, generator=g)]
        rewrite(folder, lambda tensors, name=name, g_idx=g_idx: tensors.update({f"{name}.g_idx": g_idx}))  # type: ignore[misc]
        weights[name] = QTensor(tensor.codes, tensor.scales, tensor.zeros, tensor.scheme, g_idx).dequantize()
    reconfigure(folder, desc_act=True)
    return weights
