"""Folders of safetensors whose config.json has a quantization_config: `CodedModel`s opened, `Export`s written.

What the formats that are such folders have in common; each adds its layout and its words for quantization_config.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from auto_round.errors import FormatError, SourceError
from auto_round.formats.base import CodedLayer, CodedModel, Export
from auto_round.formats.layouts import Layout
from auto_round.formats.shards import Piece, copied, encoded, shard_sizes, write_shards
from auto_round.qtensor import QTensor, plain_g_idx
from auto_round.source.checkpoint import DTYPES, Checkpoint
from auto_round.source.opening import extra_files
from auto_round.spec.plan import LayerPlan
from auto_round.spec.scheme import Scheme

# Where older writers put their settings when config.json has none.
SIDE_FILES = {"quantization_config.json": None, "quantize_config.json": "gptq", "quant_config.json": "awq"}
INDEX = "g_idx"  # the one tensor that a file may leave out


class Rules(Protocol):
    """What a quantization_config says of each layer."""

    def resolve(self, names: Sequence[str]) -> Mapping[str, Scheme | None]:
        """Return for each layer its scheme, or None to keep it."""
        ...


def read_settings(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (config.json without its quantization_config, the quantization_config) of a folder.

    Raises SourceError when there is no readable config.json, FormatError when the model is not quantised.
    """
    config = _read_json(folder / "config.json", "is this a model folder?")
    found = config.pop("quantization_config", None)
    inner = config.get("text_config")
    if found is None and isinstance(inner, dict):
        found = inner.pop("quantization_config", None)
    for name, method in SIDE_FILES.items():
        if found is None and (folder / name).is_file():
            found = {"quant_method": method, **_read_json(folder / name, "")}
    if not isinstance(found, dict):
        raise FormatError(f"{folder / 'config.json'}: no quantization_config; the model is not quantised")
    return config, found


def _read_json(file: Path, hint: str) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SourceError(f"{file.parent}: no {file.name}; {hint}") from None
    except ValueError as error:
        raise SourceError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise SourceError(f"{file}: is a JSON {type(values).__name__}, not an object")
    return values


def method_of(path: Path) -> str | None:
    """The quant_method of a folder, None when it is no folder or says nothing; damaged files are left to `open`."""
    if not (path / "config.json").is_file():
        return None
    try:
        return str(read_settings(path)[1].get("quant_method") or "") or None
    except (FormatError, SourceError):
        return None


def open_folder(
    folder: Path, *, format: str, detail: str, layout: Layout, rules: Rules, blocks: Sequence[str] = ()
) -> CodedModel:
    """Open a folder whose quantised layers lie in `layout` and have the schemes of `rules`.

    Every layer's tensors are compared with what its scheme needs. Raises SourceError for damaged files and FormatError
    for tensors that the config does not fit.
    """
    config, settings = read_settings(folder)
    checkpoint = Checkpoint(folder)
    suffix = f".{layout.key}"
    names = [stored.removesuffix(suffix) for stored in checkpoint if stored.endswith(suffix)]
    if not names:
        raise FormatError(f"{folder}: config.json says {format}, but no tensor is called like <layer>{suffix}")
    schemes = rules.resolve(names)
    layers = {name: _layer(checkpoint, name, layout, schemes[name]) for name in names}

    def codes(name: str) -> QTensor:
        return _decode(checkpoint, layers[name], layout)

    return CodedModel(
        path=folder,
        format=format,
        detail=detail,
        config=config,
        checkpoint=checkpoint,
        layers=layers,
        block_lists=_lists(names, blocks),
        codes=codes,
        weight=lambda name: codes(name).dequantize(),
        extra=extra_files(folder),
        settings=settings,
    )


def _lists(names: Sequence[str], blocks: Sequence[str]) -> tuple[str, ...]:
    """The lists of blocks that the config names; where files spell them otherwise, theirs in front."""
    inside = tuple(f"{block}." for block in blocks)
    if any(name.startswith(inside) for name in names):
        return tuple(blocks)
    return tuple(dict.fromkeys([*block_lists(names), *blocks]))


def block_lists(names: Sequence[str]) -> tuple[str, ...]:
    """Names of the lists that numbered layers lie in: model.layers for model.layers.0.mlp.up_proj."""
    found = {match[1]: None for name in names if (match := re.match(r"(.+?)\.\d+\.", name))}
    return tuple(found)


def _layer(checkpoint: Checkpoint, name: str, layout: Layout, scheme: Scheme | None) -> CodedLayer:
    file = checkpoint.entries[f"{name}.{layout.key}"].file
    if scheme is None:
        raise FormatError(f"{file}: layer {name!r} is stored as codes, but quantization_config says that it is kept")

    def read(suffix: str) -> Tensor:
        return checkpoint.tensor(f"{name}.{suffix}")

    stored = {s: f"{name}.{s}" for s in (*layout.specs(scheme, 32, 32), INDEX) if f"{name}.{s}" in checkpoint}
    shapes = {s: checkpoint.entries[full].shape for s, full in stored.items()}
    try:
        out_features, in_features = layout.shape(shapes, scheme.bits, read)
        wanted = layout.specs(scheme, out_features, in_features)
    except (ValueError, KeyError):
        raise FormatError(
            f"{file}: layer {name!r} has tensors of shapes {shapes}, which do not belong together"
        ) from None
    if missing := [s for s in wanted if s not in stored]:
        raise FormatError(f"{file}: layer {name!r} has no tensor {name}.{missing[0]}; the checkpoint is incomplete")
    found = {s: shapes[s] for s in wanted}
    if found != {s: shape for s, (_, shape) in wanted.items()}:
        needed = {s: shape for s, (_, shape) in wanted.items()}
        raise FormatError(
            f"{file}: layer {name!r} has shapes {found}, but {scheme.name} needs {needed}; the config does not fit"
        )
    if (refusal := layout.refuse(scheme, out_features, in_features)) is not None:
        raise FormatError(f"{file}: layer {name!r} has shapes {found}, which {scheme.name} cannot have: {refusal}")
    for s, (dtype, _) in wanted.items():
        own = DTYPES.get(checkpoint.entries[stored[s]].dtype)
        if (
            own is None
            or own.is_floating_point != dtype.is_floating_point
            or (not own.is_floating_point and own != dtype)
        ):
            raise FormatError(
                f"{file}: tensor {stored[s]!r} has dtype {checkpoint.entries[stored[s]].dtype}, not {dtype}"
            )
    return CodedLayer(
        name=name,
        kind=scheme.name,
        scheme=scheme,
        out_features=out_features,
        in_features=in_features,
        nbytes=sum(checkpoint.entries[full].nbytes for full in stored.values()),
        tensors=tuple(stored.values()),
        act_order=INDEX in stored and not torch.equal(read(INDEX), plain_g_idx(scheme, in_features)),
    )


def _decode(checkpoint: Checkpoint, layer: CodedLayer, layout: Layout) -> QTensor:
    assert layer.scheme is not None
    tensors = {full.removeprefix(f"{layer.name}."): checkpoint.tensor(full) for full in layer.tensors}
    file = checkpoint.entries[layer.tensors[0]].file
    for suffix, tensor in tensors.items():
        if tensor.is_floating_point():
            if not bool(torch.isfinite(tensor).all()):
                raise FormatError(f"{file}: tensor {layer.name}.{suffix} holds infinity or NaN; the model is broken")
            half = tensor.to(torch.float16)
            tensors[suffix] = half if torch.equal(half.float(), tensor.float()) else tensor.float()
    try:
        return layout.decode(tensors, layer.scheme, layer.in_features)
    except FormatError as error:
        raise FormatError(f"{file}: layer {layer.name!r}: {error}") from None


def folder_sizes(export: Export, largest_shard: int | None, layout: Layout) -> dict[str, int]:
    """Weight files that `write_folder` would make, and the bytes of each."""
    return shard_sizes(list(_pieces(export, layout)), largest_shard)


def write_folder(
    export: Export,
    folder: Path,
    largest_shard: int | None,
    layout: Layout,
    settings: Mapping[str, Any],
    *side_files: str,
) -> None:
    """Write weights, config.json with `settings` as its quantization_config, and the source's other files.

    side_files: names of files that also hold the settings, as some readers want.
    """
    write_shards(folder, list(_pieces(export, layout)), largest_shard)
    for file in export.extra:
        shutil.copyfile(file, folder / file.name)
    for name in side_files:
        write_json(folder / name, settings)
    write_json(folder / "config.json", {**export.config, "quantization_config": settings})


def in_source_order(export: Export, piece: Callable[[LayerPlan], Piece]) -> Iterator[Piece]:
    """The output's tensors in the source's order; `piece` makes a layer's, which stand where its first one stood."""
    planned, done = export.plan.quantised, set()
    for stored in export.checkpoint:
        name = export.replaced.get(stored)
        if name is None:
            yield copied(export.checkpoint, stored)
        elif name not in done:
            done.add(name)
            yield piece(planned[name])


def _pieces(export: Export, layout: Layout) -> Iterator[Piece]:
    def packed(layer: LayerPlan) -> Piece:
        assert layer.scheme is not None
        specs = layout.specs(layer.scheme, layer.out_features, layer.in_features)
        prefix = export.stored_names[layer.name].removesuffix(".weight")
        return encoded(prefix, specs, lambda: layout.encode(export.tensor(layer.name)))

    return in_source_order(export, packed)


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Write indented JSON with a newline at its end."""
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def prove_codes(export: Export, model: CodedModel) -> None:
    """Every planned layer must be in `model`, and nothing else, bit-identical to its codes in the export."""
    missing = {export.stored_names[name].removesuffix(".weight"): name for name in export.plan.quantised}
    for stored in model.layers:
        name = missing.pop(stored, None)
        if name is None:
            raise FormatError(f"{model.path}: read back a layer {stored!r} that was not to be written")
        if not model.codes(stored).same(export.tensor(name)):
            raise FormatError(f"{model.path}: layer {stored!r} does not read back as it was tuned; please report this")
    if missing:
        raise FormatError(f"{model.path}: {len(missing)} layers are missing, {next(iter(missing))!r} among them")
