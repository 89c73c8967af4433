"""Writing a GGUF file through the `gguf` package, one tensor in memory at a time.

File: "GGUF", version 3, counts; keys and values; name, reversed shape, type and offset of every tensor; the tensors'
bytes, each at a multiple of 32. A quantised layer's bytes are those of its `BlockTensor`, rows in llama.cpp's order.
Norms, biases and routers are float32; what is kept stays in its 16-bit floats; embeddings are quantised here by search.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from torch import Tensor

from auto_round.errors import FormatError
from auto_round.formats.base import CodedModel, Export
from auto_round.formats.gguf.architectures import EXPERT, Model
from auto_round.formats.gguf.mixing import FILE_TYPES, Shape, embedding_type, layer_type, output_type
from auto_round.formats.gguf.opening import open_file
from auto_round.formats.gguf.reader import read_layers
from auto_round.formats.gguf.vocabulary import read_vocabulary
from auto_round.numerics.kquant import nearest_blocks
from auto_round.qtensor import BlockTensor, to_blocks
from auto_round.runtime.durable import sync
from auto_round.source.checkpoint import DTYPES
from auto_round.spec.blocks import BlockScheme, block_of
from auto_round.spec.plan import LayerPlan, LinearShape, Plan
from auto_round.spec.scheme import Scheme

FLOATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F32"}
ALIGNMENT = 32  # bytes; every tensor starts at a multiple
ROWS = 4096  # rows of an embedding quantised at a time


@dataclass(frozen=True)
class Item:
    """One tensor of the file: name, ggml type, shape in bytes (last dimension) or in elements, how to make it."""

    name: str
    kind: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


class GgufFormat:
    """Writer and reader of one file type, such as q4_k_m."""

    holds_act_order = False
    holds_conv1d = True
    holds_tokenizer = True

    def __init__(self, file_type: str) -> None:
        self.file_type = file_type
        self.name = f"gguf:{file_type}"

    def prescribe(
        self, layers: Sequence[LinearShape], config: Mapping[str, Any], tokenizer: Any | None
    ) -> Mapping[str, BlockScheme | None]:
        """Give every layer the type it has in this mix; raise FormatError when llama.cpp cannot run the model."""
        model = Model(config)
        read_vocabulary(tokenizer, int(model.config.vocab_size))
        return {layer.name: self._layer_type(model, layer) for layer in layers}

    def _layer_type(self, model: Model, layer: LinearShape) -> BlockScheme | None:
        name = model.tensor_name(layer.name + ".weight")
        if name is None or not name.startswith("blk."):
            return None if name is None else output_type(self.file_type, layer.in_features)
        if "_inp" in name:  # routers stay in floats
            return None
        shape = Shape(model.layers, model.heads // model.key_heads, model.experts)
        return layer_type(self.file_type, name, layer.in_features, shape)

    def refuse(self, shape: LinearShape, scheme: Scheme) -> str | None:
        """Block types whose blocks divide the inputs, and the two integer schemes whose grid a block type has."""
        if isinstance(scheme, BlockScheme):
            if shape.in_features % scheme.size:
                return f"{shape.in_features} inputs are no multiple of {scheme.size}, the block of {scheme.name}"
            return None
        if block_of(scheme, shape.in_features) is None:
            return (
                f"{self.name} has grids of its own, not that of {scheme.name}: save it alone, or quantise "
                "symmetrically with 4 or 8 bits in groups of 32"
            )
        return None

    def check(self, plan: Plan) -> None:
        """A matrix of all experts is one tensor of one type; a file is called by the type that most layers have."""
        stacks: dict[str, set[BlockScheme | None]] = {}
        for layer in plan.layers:
            if EXPERT.search(layer.name):
                stacks.setdefault(EXPERT.sub(".experts.*.", layer.name), set()).add(_type_of(layer))
        mixed = next((name for name, kinds in stacks.items() if len(kinds) > 1), None)
        if mixed is not None:
            kinds = ", ".join(sorted(kind.name if kind else "kept" for kind in stacks[mixed]))
            raise FormatError(
                f"GGUF: {mixed!r} is one tensor of one type, but its experts are {kinds}; give all of them one type, "
                "or keep them all"
            )
        usual = None if isinstance(plan.scheme, BlockScheme) else block_of(plan.scheme, plan.scheme.group_size)
        if usual is not None and usual.name != FILE_TYPES[self.file_type][1]:
            raise FormatError(
                f"{self.name} cannot be made from {plan.scheme.name}, whose grid is that of {usual.name}: choose "
                f"gguf:{usual.name}, or quantise the original model as {self.name} alone"
            )

    def settings(self, plan: Plan) -> Mapping[str, Any]:
        """Nothing: the file says it in its own words."""
        return {}

    def sizes(self, export: Export, largest_shard: int | None) -> Mapping[str, int]:
        """Names and bytes of the files: heads as they will be written, and the tensors behind them."""
        with tempfile.TemporaryDirectory() as scratch:
            writer, _ = self._begin(export, Path(scratch), largest_shard)
            writer.close()
            heads = sorted(Path(scratch).iterdir())
            return {
                head.name: _padded(head.stat().st_size) + sum(_padded(info.nbytes) for info in tensors.values())
                for head, tensors in zip(heads, writer.tensors, strict=True)
            }

    def write(self, export: Export, folder: Path, largest_shard: int | None) -> None:
        """Write one file, or several of at most `largest_shard` bytes of tensors each, into `folder`.

        None: one, whatever its size, as Ollama and transformers open no others.
        """
        writer, items = self._begin(export, folder, largest_shard)
        for item in items:
            writer.write_tensor_data(item.make().contiguous().numpy())
        writer.close()
        for written in folder.glob("*.gguf"):
            sync(written)

    def _begin(self, export: Export, folder: Path, largest_shard: int | None) -> tuple[GGUFWriter, list[Item]]:
        """Write the heads of the files; what follows are the tensors in order."""
        model = Model(export.config, export.checkpoint)
        title = export.title.rstrip("/").rsplit("/", 1)[-1].removesuffix(".gguf") or "model"
        file = folder / f"{title}-{self.file_type.upper()}.gguf"
        items = list(self._items(export, model))
        total = sum(_nbytes(item) for item in items)
        split = largest_shard if largest_shard is not None and total > largest_shard else 0
        writer = GGUFWriter(file, model.name, split_max_size=split)
        self._describe(writer, export, model, title)
        for item in items:
            dtype = np.dtype(np.float32 if item.kind == "F32" else np.uint8)
            raw = None if item.kind == "F32" else GGMLQuantizationType[item.kind]
            writer.add_tensor_info(item.name, item.shape, dtype, _nbytes(item), raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        return writer, items

    def prove(self, export: Export, folder: Path) -> None:
        """Every layer must read back byte for byte."""
        missing = {export.stored_names[name]: name for name in export.plan.quantised}
        files = sorted(folder.glob("*.gguf"))
        for file in files:
            for module, blocks in read_layers(file, files[0]):
                name = missing.pop(f"{module}.weight", None) or missing.pop(
                    f"{module.removeprefix('model.')}.weight", None
                )
                if name is None or not blocks.same(_blocks(export, name)):
                    raise FormatError(
                        f"{file}: layer {module!r} does not read back as it was tuned; please report this"
                    )
        if missing:
            raise FormatError(f"{folder}: {len(missing)} layers are missing, {next(iter(missing))!r} among them")

    def open(self, path: Path, scratch: Path) -> CodedModel | None:
        """Open a .gguf file, or a folder of one; every name of a file type opens every GGUF file."""
        return open_file(path, scratch)

    def _describe(self, writer: GGUFWriter, export: Export, model: Model, title: str) -> None:
        writer.add_type("model")
        writer.add_name(title)
        writer.add_file_type(FILE_TYPES[self.file_type][0])
        writer.add_quantization_version(2)
        writer.add_quantized_by(f"auto-round {export.provenance.get('autoround_version', '')}".strip())
        for key in ("iters", "seed"):  # what is known before the run, so that sizes can be told; the rest is beside
            if key in export.provenance:
                writer.add_string(f"auto_round.{key}", str(export.provenance[key]))
        model.describe(writer)
        read_vocabulary(export.tokenizer, int(model.config.vocab_size)).describe(writer)

    def _items(self, export: Export, model: Model) -> Iterator[Item]:
        weights = _weights(export)
        experts: dict[str, list[str]] = {}
        for stored, layer in weights.items():
            name = model.tensor_name(stored)
            if name is None:
                continue
            if EXPERT.search(stored):
                experts.setdefault(name, []).append(stored)
            elif layer is not None:
                yield self._layer(export, model, name, [layer])
            else:
                yield self._other(export, model, name, stored)
        for name, members in experts.items():
            members.sort(key=_expert_number)
            layers = [layer for stored in members if (layer := weights[stored]) is not None]
            if layers:  # then all of them: see `check`
                yield self._layer(export, model, name, layers)
            else:
                yield _stacked_floats(export, name, members)
        for name, tensor in model.extra_tensors().items():
            yield Item(name, "F32", tuple(tensor.shape), lambda tensor=tensor: tensor)  # type: ignore[misc]

    def _layer(self, export: Export, model: Model, name: str, members: Sequence[str]) -> Item:
        """A layer's blocks; those of all experts in one tensor (experts, out, bytes)."""
        plans = [export.plan.quantised[member] for member in members]
        scheme = _type_of(plans[0])
        assert scheme is not None  # see `refuse`
        shape = (plans[0].out_features, plans[0].in_features // scheme.size * scheme.block_bytes)
        order = model.row_order(name)

        def rows(member: str) -> Tensor:
            data = _blocks(export, member).data
            return data if order is None else data[order]

        if len(members) == 1 and "_exps" not in name:
            return Item(name, scheme.name.upper(), shape, lambda: rows(members[0]))
        stacked = (len(members), *shape)
        return Item(name, scheme.name.upper(), stacked, lambda: torch.stack([rows(member) for member in members]))

    def _other(self, export: Export, model: Model, name: str, stored: str) -> Item:
        entry = export.checkpoint.entries[stored]
        order, shift = model.row_order(name), float(model.is_shifted_norm(name))
        if name == "token_embd.weight":
            scheme = embedding_type(self.file_type, entry.shape[1], tied=model.tied)
            if scheme is not None:
                packed = (entry.shape[0], entry.shape[1] // scheme.size * scheme.block_bytes)
                return Item(name, scheme.name.upper(), packed, lambda: _embedding(export, stored, scheme))
        shape = entry.shape[1:] if "ffn_gate_inp_shexp" in name else entry.shape  # one row, a vector there
        kind = _float_kind(export, stored)
        if len(shape) == 1 or "norm" in name or "_inp" in name:
            kind = "F32"

        def make() -> Tensor:
            tensor = export.checkpoint.tensor(stored)
            tensor = tensor if order is None else tensor[order]
            return tensor.float().reshape(shape) + shift if kind == "F32" else tensor.contiguous().view(torch.uint8)

        return _floats(name, kind, shape, make)


def _weights(export: Export) -> dict[str, str | None]:
    """Names of the tensors in the source's order, with the layer where it is one; a layer's codes are one weight."""
    found: dict[str, str | None] = {}
    for stored in export.checkpoint:
        layer = export.replaced.get(stored)
        found.setdefault(stored if layer is None else export.stored_names[layer], layer)
    return found


def _type_of(layer: LayerPlan) -> BlockScheme | None:
    """The type that holds a layer's codes; None when it is kept."""
    return None if layer.scheme is None else block_of(layer.scheme, layer.in_features)


def _blocks(export: Export, name: str) -> BlockTensor:
    return export.blocks(name) if export.blocks else to_blocks(export.tensor(name))


def _expert_number(stored: str) -> int:
    found = EXPERT.search(stored)
    return int(found[1]) if found else 0


def _stacked_floats(export: Export, name: str, members: Sequence[str]) -> Item:
    kinds = {_float_kind(export, member) for member in members}
    kind = kinds.pop() if len(kinds) == 1 else "F32"

    def make() -> Tensor:
        stack = torch.stack([export.checkpoint.tensor(member) for member in members])
        return stack.float() if kind == "F32" else stack.view(torch.uint8)

    return _floats(name, kind, (len(members), *export.checkpoint.entries[members[0]].shape), make)


def _floats(name: str, kind: str, shape: tuple[int, ...], make: Callable[[], Tensor]) -> Item:
    """An item of the type `kind` of floats; shape: in elements. `make` gives float32, or the bytes of 16-bit floats."""
    return Item(name, kind, shape if kind == "F32" else (*shape[:-1], 2 * shape[-1]), make)


def _float_kind(export: Export, stored: str) -> str:
    """The type in which a kept tensor is written; FormatError when it is of no floats."""
    dtype = export.checkpoint.entries[stored].dtype
    kind = FLOATS.get(DTYPES.get(dtype, torch.uint8))
    if kind is None:
        raise FormatError(f"GGUF: tensor {stored!r} has dtype {dtype}, which is not written")
    return kind


def _nbytes(item: Item) -> int:
    return int(np.prod(item.shape)) * (4 if item.kind == "F32" else 1)


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _embedding(export: Export, stored: str, scheme: BlockScheme) -> Tensor:
    """Blocks of an embedding, its rows a part at a time."""
    return torch.cat([nearest_blocks(rows.float(), scheme) for rows in export.checkpoint.tensor(stored).split(ROWS)])


Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 = (GgufFormat(name) for name in ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0"))
Q2_K, Q2_K_S, Q6_K = (GgufFormat(name) for name in ("q2_k", "q2_k_s", "q6_k"))
Q3_K_S, Q3_K_M, Q3_K_L = (GgufFormat(name) for name in ("q3_k_s", "q3_k_m", "q3_k_l"))
Q4_K_S, Q4_K_M, Q5_K_S, Q5_K_M = (GgufFormat(name) for name in ("q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m"))
