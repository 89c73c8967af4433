"""Opening a GGUF file as a quantised model: its blocks under ``<layer>.blocks`` and its floats by transformers' names.

Both go once into a folder of safetensors, so that everything which works on a `CodedModel` works on GGUF as well.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from auto_round.errors import FormatError, SourceError
from auto_round.formats.base import CodedLayer, CodedModel
from auto_round.formats.folder import block_lists
from auto_round.formats.gguf.mixing import FILE_TYPES
from auto_round.formats.gguf.reader import GgufFile, read_parts
from auto_round.qtensor import BlockTensor, QTensor, from_blocks
from auto_round.source.checkpoint import Checkpoint
from auto_round.source.opening import SHARD, extra_files, not_read
from auto_round.spec.blocks import BlockScheme, integer_of

AT_ONCE = 1 << 28  # bytes of tensors in memory while unpacking


def open_file(path: Path, scratch: Path) -> CodedModel | None:
    """Open a .gguf file or a folder of one, unpacking it into `scratch`; None when `path` is neither.

    Raises FormatError for a damaged or incomplete file or an architecture without a table, SourceError when
    transformers cannot read its keys.
    """
    found = sorted(path.glob("*.gguf")) if path.is_dir() and not (path / "config.json").exists() else []
    first = path if path.suffix == ".gguf" and path.is_file() else next(iter(found), None)
    if first is None:
        return None
    files = _shards(first)
    folder = scratch / "gguf"
    folder.mkdir(parents=True, exist_ok=True)
    config = _describe(files[0].file, folder)
    layers, kinds = _unpack(files, folder)
    checkpoint = Checkpoint(folder)

    def stored(name: str) -> BlockTensor:
        return BlockTensor(checkpoint.tensor(f"{name}.blocks"), kinds[name])

    def codes(name: str) -> QTensor:
        return from_blocks(stored(name))

    def weight(name: str) -> Tensor:
        values = stored(name).dequantize()
        if not bool(torch.isfinite(values).all()):
            raise FormatError(f"{path}: layer {name!r} holds infinity or NaN")
        return values

    label = files[0].value("general.file_type")
    known = next((name for name, (number, _) in FILE_TYPES.items() if number == label), "q4_0")
    return CodedModel(
        path=path,
        format=f"gguf:{known}",
        detail=f"{files[0].value('general.architecture')}, {len(files)} file(s)",
        config=config,
        checkpoint=checkpoint,
        layers=layers,
        block_lists=block_lists(list(layers)),
        codes=codes,
        weight=weight,
        extra=extra_files(folder),
        settings={"quant_method": "gguf", "file_type": known, **_provenance(files[0])},
        not_in_config=not_read(files[0].value, [name for file in files for name in file.tensors]),
    )


def _provenance(file: GgufFile) -> dict[str, str]:
    """What our writer says of the run that made a file; nothing in files of others."""
    found = {key: file.value(f"auto_round.{key}") for key in ("iters", "seed")}
    return {key: value for key, value in found.items() if value is not None}


def _shards(first: Path) -> list[GgufFile]:
    match = SHARD.search(first.name)
    if match is None:
        return [GgufFile(first)]
    stem, count = first.name[: match.start()], int(match[2])
    names = [f"{stem}-{i:05d}-of-{count:05d}.gguf" for i in range(1, count + 1)]
    missing = next((name for name in names if not (first.parent / name).is_file()), None)
    if missing is not None:
        raise FormatError(f"{first.parent / missing}: is missing, the model has {count} files")
    return [GgufFile(first.parent / name) for name in names]


def _describe(first: Path, folder: Path) -> Mapping[str, Any]:
    """Config of the model as transformers reads it from the keys; its tokenizer goes into `folder`."""
    try:
        config = AutoConfig.from_pretrained(first.parent, gguf_file=first.name)
        AutoTokenizer.from_pretrained(first.parent, gguf_file=first.name).save_pretrained(folder)
    except (ValueError, OSError, KeyError, NotImplementedError) as error:
        raise SourceError(f"{first}: transformers {transformers.__version__} cannot read its keys: {error}") from None
    return {key: value for key, value in config.to_dict().items() if key != "quantization_config"}


def _unpack(files: list[GgufFile], folder: Path) -> tuple[dict[str, CodedLayer], dict[str, BlockScheme]]:
    """Write all tensors as safetensors, some at a time; return the layers in blocks and their types."""
    layers: dict[str, CodedLayer] = {}
    kinds: dict[str, BlockScheme] = {}
    weight_map: dict[str, str] = {}
    waiting: dict[str, Tensor] = {}

    def flush() -> None:
        name = f"part-{len(set(weight_map.values())):05d}.safetensors"
        save_file(waiting, folder / name)
        weight_map.update(dict.fromkeys(waiting, name))
        waiting.clear()

    for file in files:
        for name, part in read_parts(file, files[0]):
            if not isinstance(part, BlockTensor):
                waiting[name] = part.contiguous()
            elif name == "model.embed_tokens.weight":
                waiting[name] = part.dequantize(torch.float16)
            else:
                module = name.removesuffix(".weight")
                waiting[f"{module}.blocks"] = part.data.contiguous()
                kinds[module], layers[module] = part.scheme, _layer(module, part)
            if sum(tensor.nbytes for tensor in waiting.values()) > AT_ONCE:
                flush()
    flush()
    index = json.dumps({"weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    return layers, kinds


def _layer(name: str, tensor: BlockTensor) -> CodedLayer:
    return CodedLayer(
        name=name,
        kind=tensor.scheme.name.upper(),
        scheme=integer_of(tensor.scheme) or tensor.scheme,
        out_features=tensor.out_features,
        in_features=tensor.in_features,
        nbytes=tensor.data.nbytes,
        tensors=(f"{name}.blocks",),
    )
