"""Opening a quantised folder: as a model (through transformers), or as plain tensors without transformers.

`convert` runs before the weights are read and puts a `QLinear` in place of every Linear that the folder holds as codes;
`finish` runs after and refuses a model that is not wholly there. `load_qtensors` reads the same folder layer by layer.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from auto_round.errors import FormatError, SourceError
from auto_round.formats.auto_round import LAYOUTS
from auto_round.formats.layouts import AWQ, Layout
from auto_round.inference.config import CheckpointConfig
from auto_round.inference.qlinear import QLinear
from auto_round.inference.select import choose, requested
from auto_round.qtensor import QTensor
from auto_round.source.blocks import find_block_lists
from auto_round.source.checkpoint import Checkpoint
from auto_round.spec.scheme import Scheme

logger = logging.getLogger("auto_round")


def convert(model: nn.Module, device: torch.device) -> tuple[nn.Module, list[str]]:
    """Replace the Linears that `model.config.quantization_config` says are quantised by `QLinear`s, in place.

    model: on the meta device, without weights. device: where most of it will run.
    Returns the model and the names of the backends chosen. Raises FormatError for a folder that cannot be read and
    BackendError when no backend fits a layer; both name it.
    """
    config = CheckpointConfig.parse(_quantization_config(model))
    requested(config.backend)
    linears = {name: m for name, m in model.named_modules() if type(m) is nn.Linear}
    schemes = config.resolve(list(linears), config.blocks or find_block_lists(model))
    chosen: Counter[tuple[str, str]] = Counter()
    for name, scheme in schemes.items():
        if scheme is not None:
            layer = _make(model, name, linears[name], scheme, config, device)
            _install(model, name, layer)
            chosen[scheme.name, layer.backend.name] += 1
    if not chosen:
        blocks, example = ", ".join(config.blocks) or "not named", next(iter(linears), "nothing")
        raise FormatError(
            f"quantization_config selects none of the {len(linears)} Linear layers of {type(model).__name__}: "
            f"its blocks are {blocks}, the layers are named like {example!r}"
        )
    logger.info(
        "%s on %s", ", ".join(f"{count} layers {name} with {used}" for (name, used), count in chosen.items()), device
    )
    return model, sorted({used for _, used in chosen})


def finish(model: nn.Module) -> None:
    """Check that the checkpoint gave every tensor of the quantised layers and their blocks, then prepare the layers.

    Raises FormatError otherwise: transformers itself only warns and goes on with uninitialised or random weights.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QLinear)}
    missing = [f"{name}.{tensor}" for name, m in layers.items() for tensor in m.missing()]
    missing += _missing_beside(model, layers)
    if missing:
        raise FormatError(
            f"{len(missing)} tensors are not in the checkpoint or have other shapes there, {missing[0]!r} among them: "
            "files are missing, or its quantization_config is of another model. Download or quantise it again"
        )
    for layer in layers.values():
        layer.prepare(_dtype(model, layer))


def load_qtensors(folder: Path | str) -> Iterator[tuple[str, QTensor]]:
    """Yield (layer name as in the file, codes) of every quantised layer of an auto_round-format folder, one at a time.

    Raises SourceError or FormatError when the folder cannot be read.
    """
    folder = Path(folder)
    config = CheckpointConfig.parse(_read_config(folder))
    yield from _layers(Checkpoint(folder), config)


def dequantized_state_dict(folder: Path | str) -> dict[str, Tensor]:
    """Return all tensors of an auto_round-format folder, quantised weights as exact float32 under ``<layer>.weight``.

    >>> from auto_round.load import dequantized_state_dict
    >>> model.load_state_dict(dequantized_state_dict("./tmp_autoround"))  # doctest: +SKIP
    """
    folder = Path(folder)
    checkpoint, config = Checkpoint(folder), CheckpointConfig.parse(_read_config(folder))
    weights = {name: tensor.dequantize() for name, tensor in _layers(checkpoint, config)}
    suffixes = ("qweight", "qzeros", "scales", "g_idx")
    packed = {f"{name}.{suffix}" for name in weights for suffix in suffixes}
    plain = {name: checkpoint.tensor(name) for name in checkpoint if name not in packed}
    return {**plain, **{f"{name}.weight": weight for name, weight in weights.items()}}


def _quantization_config(model: nn.Module) -> Any:
    # transformers puts the merged config here before it calls; dicts come from models opened by hand.
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if config is None:
        raise FormatError(
            f"{type(model).__name__} has no quantization_config, so nothing says which layers are quantised"
        )
    return config


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SourceError(f"{folder}: no config.json; is this a model folder?") from None
    except ValueError as error:
        raise SourceError(f"{file}: not valid JSON ({error})") from None
    found = values.get("quantization_config") or values.get("text_config", {}).get("quantization_config")
    if not isinstance(found, dict):
        raise FormatError(f"{file}: no quantization_config; the model is not quantised")
    if found.get("quant_method") != "auto-round":
        raise FormatError(f"{file}: quant_method {found.get('quant_method')!r} is not read here, only 'auto-round'")
    return found


def _layers(checkpoint: Checkpoint, config: CheckpointConfig) -> Iterator[tuple[str, QTensor]]:
    layout = LAYOUTS[config.packing]
    names = [stored.removesuffix(".qweight") for stored in checkpoint if stored.endswith(".qweight")]
    for name, scheme in config.resolve(names).items():
        if scheme is None:
            raise FormatError(f"layer {name!r} is stored as codes, but quantization_config says that it is kept")
        yield name, _decode(checkpoint, name, layout, scheme)


def _decode(checkpoint: Checkpoint, name: str, layout: Layout, scheme: Scheme) -> QTensor:
    tensors = {suffix: checkpoint.tensor(f"{name}.{suffix}") for suffix in ("qweight", "qzeros", "scales")}
    rows = tensors["qweight"].shape[0]
    in_features = rows if layout is AWQ else rows * 32 // scheme.bits
    out_features = tensors["scales"].shape[-1]
    found = {suffix: tuple(t.shape) for suffix, t in tensors.items()}
    wanted = {suffix: shape for suffix, (_, shape) in layout.specs(scheme, out_features, in_features).items()}
    if found != wanted:
        raise FormatError(
            f"layer {name!r} has shapes {found}, but {scheme.name} needs {wanted}; the config does not fit"
        )
    try:
        return layout.decode({**tensors, "scales": tensors["scales"].to(torch.float16)}, scheme, in_features)
    except FormatError as error:
        raise FormatError(f"layer {name!r}: {error}") from None


def _make(
    model: nn.Module, name: str, linear: nn.Linear, scheme: Scheme, config: CheckpointConfig, device: torch.device
) -> QLinear:
    layout = LAYOUTS[config.packing]
    shape = (linear.out_features, linear.in_features)
    refusal = layout.refuse(scheme, *shape)
    if refusal is not None:
        raise FormatError(f"layer {name!r} cannot be {scheme.name} in packing {config.packing!r}: {refusal}")
    # all_tied_weights_keys: transformers' map from a parameter to the one it shares memory with.
    if f"{name}.weight" in getattr(model, "all_tied_weights_keys", {}):
        raise FormatError(
            f"layer {name!r} is quantised, but config.json ties its weight to the embedding (tie_word_embeddings); "
            'set "tie_word_embeddings": false there, the folder has tensors for both'
        )
    return QLinear(
        linear.in_features,
        linear.out_features,
        scheme=scheme,
        layout=layout,
        backend=choose(config.backend, name, scheme, shape, linear.weight.dtype, device),
        bias=linear.bias,
        name=name,
    )


def _install(model: nn.Module, name: str, layer: QLinear) -> None:
    """Put `layer` in its place; keep transformers from initialising it or its parent, which may reach for `.weight`."""
    parent_name, _, own = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    setattr(parent, own, layer)
    for module in (layer, parent):
        object.__setattr__(module, "_is_hf_initialized", True)


def _missing_beside(model: nn.Module, layers: dict[str, QLinear]) -> list[str]:
    """Other parameters of the quantised layers' blocks that were not read, such as the weight of a layer that is kept.

    transformers marks what it reads with `_is_hf_initialized`. The mark may be gone from what accelerate moved, so a
    model spread over several devices is not judged.
    """
    # hf_device_map: set by accelerate when it dispatched the model.
    if len({str(d) for d in getattr(model, "hf_device_map", {}).values()}) > 1:
        return []
    lists = {match[0] for name in layers if (match := re.match(r"(?:.*?\.)?\d+\.", name))}
    prefixes = tuple({re.sub(r"\d+\.$", "", prefix) for prefix in lists})
    inside = {name: p for name, p in model.named_parameters() if name.startswith(prefixes)} if prefixes else {}
    owned = {f"{name}.bias" for name in layers}
    return [name for name, p in inside.items() if name not in owned and not getattr(p, "_is_hf_initialized", False)]


def _dtype(model: nn.Module, layer: QLinear) -> torch.dtype:
    """The dtype of the layer's inputs: that of its bias, else of the model's first floating-point parameter."""
    parameters = [layer.bias] if layer.bias is not None else model.parameters()
    return next((p.dtype for p in parameters if p.is_floating_point()), torch.float32)
