"""Opening a quantised folder: as a model (through transformers), or as plain tensors without transformers.

`convert` runs before the weights are read and puts a `QLinear` in place of every Linear that the folder holds as codes;
`finish` runs after and refuses a model that is not wholly there. `load_qtensors` reads the same folder layer by layer.
"""

from __future__ import annotations

import dataclasses
import logging
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from auto_round.errors import BackendError, FormatError
from auto_round.formats import open_coded
from auto_round.formats.auto_round import settings
from auto_round.formats.config import GPTQ_V1, INDEXED, LAYOUTS, PACKINGS, RAW, UNSAID_PACKING, CheckpointConfig
from auto_round.formats.folder import INDEX, block_lists
from auto_round.formats.layouts import GPTQ_RAW
from auto_round.inference.dense import use_native_for_dense
from auto_round.inference.head import round_head
from auto_round.inference.qlinear import QLinear
from auto_round.inference.select import better_installed, choose, choose_stored, requested
from auto_round.qtensor import QTensor, plain_g_idx
from auto_round.source.blocks import find_block_lists, linears_in
from auto_round.source.fused import Fused, find_fused, open_fused
from auto_round.spec.scheme import Scheme

# Keys of GPTQ's and AWQ's configs that an auto_round folder says otherwise.
FOREIGN_KEYS = (
    "checkpoint_format",
    "damp_percent",
    "desc_act",
    "dynamic",
    "format",
    "lm_head",
    "modules_in_block_to_quantize",
    "modules_to_not_convert",
    "pack_dtype",
    "static_groups",
    "to_quant_block_names",
    "true_sequential",
    "version",
    "zero_point",
)

logger = logging.getLogger("auto_round")


def convert(model: nn.Module, device: torch.device) -> tuple[nn.Module, list[str]]:
    """Replace the Linears that `model.config.quantization_config` says are quantised by `QLinear`s, in place.

    model: on the meta device, without weights. device: where most of it will run.
    Returns the model and the names of the backends chosen. Raises FormatError for a folder that cannot be read and
    BackendError when no backend fits a layer; both name it.
    """
    config = CheckpointConfig.parse(_quantization_config(model))
    requested(config.backend)
    fused = fused_of(model)
    names = [*linears_in(model), *(name for item in fused for name in item.slices)]
    schemes = config.resolve(names, config.blocks or find_block_lists(model))
    _open(model, fused, schemes)
    linears = linears_in(model)
    chosen: Counter[tuple[str, str]] = Counter()
    installs: set[str] = set()
    for name, scheme in schemes.items():
        if scheme is not None:
            layer = _make(model, name, linears[name], scheme, config, device)
            _install(model, name, layer, linears[name].weight.dtype)
            chosen[scheme.name, layer.backend.name] += 1
            shape = (layer.out_features, layer.in_features)
            install = better_installed(layer.backend, scheme, shape, linears[name].weight.dtype, device)
            installs |= {install} if install else set()
    if not chosen:
        blocks, example = ", ".join(config.blocks) or "not named", next(iter(linears), "nothing")
        raise FormatError(
            f"quantization_config selects none of the {len(linears)} Linear layers of {type(model).__name__}: "
            f"its blocks are {blocks}, the layers are named like {example!r}"
        )
    counts = ", ".join(f"{count} layers {name} with {used}" for (name, used), count in chosen.items())
    advice = "".join(f"; faster after: {install}" for install in sorted(installs))
    logger.info("%s on %s%s", counts, device, advice)
    return model, sorted({used for _, used in chosen})


def fused_of(model: nn.Module) -> list[Fused]:
    """The parameters of `model` that may be Linears in all but name."""
    rules = get_model_conversion_mapping(model) if isinstance(model, PreTrainedModel) else []
    return find_fused(model, [rule for rule in rules if isinstance(rule, WeightConverter)])


def _open(model: nn.Module, fused: list[Fused], schemes: dict[str, Scheme | None]) -> None:
    """Put Linears in place of those `fused` that are quantised."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    for item in fused:
        kept = [name for name in item.slices if schemes[name] is None]
        if kept and len(kept) < len(item.slices):
            raise FormatError(f"{kept[0]!r} is kept but other experts of {item.full_name!r} are quantised")
        if not kept:
            open_fused(model, [item], lambda layer: _dense(layer, dtype))


def _dense(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    assert isinstance(layer, QLinear)
    return layer.qtensor().dequantize(dtype)


def finish(model: nn.Module) -> None:
    """Check that the checkpoint gave every tensor of the quantised layers and their blocks, then prepare the layers.

    Raises FormatError otherwise: transformers itself only warns and goes on with uninitialised or random weights.
    """
    config = CheckpointConfig.parse(_quantization_config(model))
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QLinear)}
    absent = {name: m.missing() for name, m in layers.items()}
    optional = () if config.act_order else (INDEX,)
    missing = [f"{name}.{tensor}" for name, found in absent.items() for tensor in found if tensor not in optional]
    missing += _missing_beside(model, layers)
    if missing:
        raise FormatError(
            f"{len(missing)} tensors are not in the checkpoint or have other shapes there, {missing[0]!r} among them: "
            "files are missing, or its quantization_config is of another model. Download or quantise it again"
        )
    if config.indexed:
        reordered = {name: _group_inputs(m, INDEX in absent[name], config) for name, m in layers.items()}
        config = dataclasses.replace(config, act_order=any(reordered.values()))
    for layer in layers.values():
        dtype = _dtype(model, layer)
        if layer.offloaded and layer.backend.repacks:  # what repacks needs the tensors now
            shape = (layer.out_features, layer.in_features)
            layer.backend = choose_stored(config.backend, layer.name, layer.scheme, shape, dtype)
        layer.prepare(dtype)
    _say_how_it_is_saved(model, layers, config)
    if config.lm_head_bits is not None:
        used = round_head(model, config.lm_head_bits, GPTQ_RAW, config.backend)
        logger.info("output head rounded to %d bits with %s", config.lm_head_bits, used)
    use_native_for_dense(model, config.backend)


def _group_inputs(layer: QLinear, without_index: bool, config: CheckpointConfig) -> bool:
    """Free `layer` of its g_idx, bringing the inputs of a group together if they are not; True when they were not."""
    plain = LAYOUTS[config.packing]
    tensors = dict(layer.stored().tensors)
    g_idx = tensors.pop(INDEX)
    if g_idx.is_meta and not without_index:
        raise BackendError(f"layer {layer.name!r} is offloaded, and its g_idx has to be read; load without offloading")
    saved_as = INDEXED[config.packing] if config.act_order else plain
    if without_index or torch.equal(g_idx, plain_g_idx(layer.scheme, layer.in_features).to(g_idx.device)):
        layer.arrange(tensors, plain, None, saved_as)
        return False
    try:
        tensor, order = layer.stored().qtensor().in_order()
    except FormatError as error:
        raise FormatError(f"layer {layer.name!r}: {error}") from None
    layer.arrange(plain.encode(tensor), plain, order, INDEXED[config.packing])
    return True


def _say_how_it_is_saved(model: nn.Module, layers: Mapping[str, QLinear], config: CheckpointConfig) -> None:
    """Make the quantization_config of a folder of another tool that of an auto_round folder, which saving writes.

    What it says of this load alone is left out.
    """
    target = _quantization_config(model)
    given = target if isinstance(target, dict) else vars(target)
    for key in ("asked_backend", "lm_head_bits"):
        given.pop(key, None)
    named = given.get("backend", "auto")
    if named != "auto" and named in PACKINGS and given.get("packing_format") in (None, UNSAID_PACKING):
        given["packing_format"] = named  # old folders say it in their backend
    given["backend"] = "auto"
    if not any(key in given for key in FOREIGN_KEYS):
        return
    for key in FOREIGN_KEYS:
        given.pop(key, None)
    kept = [*linears_in(model), *(name for item in fused_of(model) for name in item.slices)]
    schemes = {**dict.fromkeys(kept), **{name: layer.scheme for name, layer in layers.items()}}
    packing = "auto_round:gptq" if config.act_order and config.packing == GPTQ_V1 else config.packing
    packing = "auto_round:gptqmodel" if config.act_order and config.packing == RAW else packing
    given.update(settings(packing, config.scheme, schemes, config.blocks or block_lists(list(layers))))
    given.update({"desc_act": True} if config.act_order else {})


def load_qtensors(folder: Path | str) -> Iterator[tuple[str, QTensor]]:
    """Yield (layer name as in the file, codes) of every quantised layer of a folder of any format, one at a time.

    Raises SourceError or FormatError when the folder cannot be read.
    """
    with tempfile.TemporaryDirectory(prefix="auto-round-") as scratch:
        model = open_coded(folder, Path(scratch))
        for name in model.layers:
            yield name, model.codes(name)


def dequantized_state_dict(folder: Path | str) -> dict[str, Tensor]:
    """Return all tensors of a quantised folder, quantised weights as exact float32 under ``<layer>.weight``.

    >>> from auto_round.load import dequantized_state_dict
    >>> model.load_state_dict(dequantized_state_dict("./tmp_autoround"))  # doctest: +SKIP
    """
    with tempfile.TemporaryDirectory(prefix="auto-round-") as scratch:
        model = open_coded(folder, Path(scratch))
        packed = {tensor for layer in model.layers.values() for tensor in layer.tensors}
        plain = {name: model.checkpoint.tensor(name) for name in model.checkpoint if name not in packed}
        return {**plain, **{f"{name}.weight": model.weight(name) for name in model.layers}}


def _quantization_config(model: nn.Module) -> Any:
    # transformers puts the merged config here before it calls; dicts come from models opened by hand.
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if config is None:
        raise FormatError(
            f"{type(model).__name__} has no quantization_config, so nothing says which layers are quantised"
        )
    return config


def _make(
    model: nn.Module, name: str, linear: nn.Linear, scheme: Scheme, config: CheckpointConfig, device: torch.device
) -> QLinear:
    layout = config.layout
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
        asked=config.backend,
    )


def _install(model: nn.Module, name: str, layer: QLinear, dtype: torch.dtype) -> None:
    """Put `layer` in its place.

    Modules around it may reach for `.weight`: transformers' initialisers, which also fill buffers that no checkpoint
    holds and so must run, and forwards that ask for its dtype. They find an empty one that counts as initialised.
    """
    weight = torch.empty(0, dtype=dtype)
    for done in (weight, layer):
        object.__setattr__(done, "_is_hf_initialized", True)
    layer.weight = weight
    parent_name, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent_name), own, layer)


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
