"""Reading a GGUF file: its layers in blocks, or all its tensors in floats, by the names transformers gives them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFReader, get_tensor_name_map
from torch import Tensor

from auto_round.errors import FormatError
from auto_round.formats.gguf.architectures import ARCHITECTURES, Architecture
from auto_round.qtensor import BlockTensor
from auto_round.spec.blocks import BLOCK_SCHEMES

# Modules of a block in transformers' architectures; the gguf package knows what each is called in a file.
FUSED = ("self_attn.qkv_proj", "mlp.gate_up_proj")
APART = (*(f"self_attn.{part}_proj" for part in "qkv"), "mlp.gate_proj", "mlp.up_proj")
IN_BLOCK = (
    *("self_attn.o_proj", "self_attn.q_norm", "self_attn.k_norm"),
    *("mlp.down_proj", "mlp.gate", "mlp.shared_expert_gate"),
    *(f"mlp.shared_expert.{part}" for part in ("gate_proj", "up_proj", "down_proj")),
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
EXPERTS = (*(f"mlp.experts.{part}" for part in ("gate_proj", "up_proj", "down_proj")),)
MIXTRAL = (*(f"block_sparse_moe.experts.{part}" for part in ("w1", "w2", "w3")), "block_sparse_moe.gate")

FLOATS = MappingProxyType({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16})


class _Reader(GGUFReader):  # type: ignore[misc]  # the package declares no types
    """The package's reader; it says in which tensor it failed, and data must follow each other as llama.cpp wants."""

    def _build_tensors(self, start_offs: int, fields: list[Any]) -> None:
        expected = start_offs
        for field in fields:
            try:
                super()._build_tensors(start_offs, [field])
            except ValueError as error:
                raise ValueError(f"tensor {field.name!r} does not fit in the file: {error}") from None
            (tensor,) = self.tensors
            if tensor.data_offset != expected:
                raise ValueError(f"tensor {field.name!r} begins at byte {tensor.data_offset}, not at {expected}")
            expected += -(-tensor.n_bytes // self.alignment) * self.alignment
        super()._build_tensors(start_offs, fields)


class GgufFile:
    """One file (or shard), mapped into memory; raises FormatError when it is damaged or of an unknown architecture."""

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            self._reader = _Reader(file)
        except (ValueError, IndexError, KeyError, OSError, UnicodeDecodeError) as error:
            raise FormatError(f"{file}: not a GGUF file, or damaged: {error}") from None
        self.tensors = {tensor.name: tensor for tensor in self._reader.tensors}

    def value(self, key: str) -> Any:
        """Value of a key; None when the file does not have it."""
        field = self._reader.get_field(key)
        return None if field is None else field.contents()

    def architecture(self) -> Architecture:
        """The row of the architecture table; FormatError when there is none."""
        name = self.value("general.architecture")
        row = next((row for row in ARCHITECTURES.values() if MODEL_ARCH_NAMES[row.arch] == name), None)
        if row is None:
            raise FormatError(f"{self.file}: architecture {name!r} is not read here")
        return row

    def number(self, key: str) -> int:
        """A whole number among the architecture's keys; FormatError when it is missing."""
        value = self.value(f"{self.value('general.architecture')}.{key}")
        if not isinstance(value, int):
            raise FormatError(f"{self.file}: key {key!r} of the architecture is missing")
        return value

    def blocks(self, name: str) -> BlockTensor | None:
        """A tensor's blocks, of all experts one after the other; None when it is in floats or of another type."""
        tensor = self.tensors[name]
        scheme = BLOCK_SCHEMES.get(GGMLQuantizationType(tensor.tensor_type).name.lower())
        if scheme is None:
            return None
        return BlockTensor(torch.from_numpy(tensor.data.copy()).reshape(-1, tensor.data.shape[-1]), scheme)

    def floats(self, name: str) -> Tensor:
        """A tensor in its own shape: float32 from blocks, else in the dtype it has; FormatError for other types."""
        tensor, blocks = self.tensors[name], self.blocks(name)
        kind = GGMLQuantizationType(tensor.tensor_type).name
        shape = tuple(int(n) for n in reversed(tensor.shape))
        if blocks is not None:
            return blocks.dequantize().reshape(shape)
        if kind not in FLOATS:
            raise FormatError(f"{self.file}: tensor {name!r} is of type {kind}, which is not read here")
        return torch.from_numpy(np.array(tensor.data)).view(FLOATS[kind]).reshape(shape)


def module_names(file: GgufFile) -> dict[str, str]:
    """GGUF tensor name without suffix -> name of transformers' module; experts by the name without their number."""
    row, layers = file.architecture(), file.number("block_count")
    names = get_tensor_name_map(row.arch, layers)
    modules = ["model.embed_tokens", "model.norm", "lm_head"]
    inside = [
        *(FUSED if row.fused else APART),
        *IN_BLOCK,
        *(MIXTRAL if MODEL_ARCH_NAMES[row.arch] == "llama" else EXPERTS),
    ]
    modules += [f"model.layers.{i}.{part}" for i in range(layers) for part in inside]
    found: dict[str, str] = {}
    for module in modules:
        name = names.get_name(module)
        if name is not None:
            found.setdefault(name, module)
    return found


def row_order(keys: GgufFile, file: GgufFile, name: str) -> Tensor | None:
    """New row of each old row of a tensor whose rows llama.cpp has in another order; None for all others."""
    key = {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"}.get(name.rsplit(".", 2)[-2])
    if key is None or not keys.architecture().permute:
        return None
    heads, rows = keys.number(key), int(file.tensors[name].shape[-1])
    return torch.arange(rows).view(heads, -1, 2).transpose(1, 2).reshape(-1)


def read_parts(file: GgufFile, first: GgufFile | None = None) -> Iterator[tuple[str, BlockTensor | Tensor]]:
    """Yield (name, tensor) of every tensor as a checkpoint of transformers has it, experts one by one.

    Matrices in blocks stay so; floats keep their dtype. first: the shard that holds the keys, when this is another.
    Raises FormatError for a tensor that this reader does not know.
    """
    keys = first or file
    modules, row = module_names(keys), keys.architecture()
    for name in file.tensors:
        base, _, suffix = name.rpartition(".")
        if base not in modules:
            if name.startswith("rope_f"):
                continue  # see `not_read`
            raise FormatError(f"{file.file}: tensor {name!r} is not known in architecture {row.arch.name.lower()}")
        module, order, blocks = modules[base], row_order(keys, file, name), file.blocks(name)
        experts = keys.number("expert_count") if "_exps" in name else 1
        if blocks is not None:
            data = blocks.data if order is None else blocks.data[order]
            parts: list[BlockTensor | Tensor] = [BlockTensor(rows, blocks.scheme) for rows in data.chunk(experts)]
        else:
            values = file.floats(name)
            values = values if order is None else values[order]
            values = values[None] if "ffn_gate_inp_shexp" in name else values
            values = values - 1 if row.norm_plus_one and base.endswith("norm") else values
            parts = list(values) if experts > 1 else [values]
        for number, part in enumerate(parts):
            own = module.replace(".experts.", f".experts.{number}.") if "_exps" in name else module
            yield f"{own}.{suffix}", part


def read_layers(path: Path, first: Path | None = None) -> Iterator[tuple[str, BlockTensor]]:
    """Yield (name of the Linear, blocks) for every Linear in blocks; the embedding is none.

    Raises FormatError for a file that is damaged or of an unknown architecture.
    """
    for name, part in read_parts(GgufFile(path), None if first is None else GgufFile(first)):
        if isinstance(part, BlockTensor) and name != "model.embed_tokens.weight":
            yield name.removesuffix(".weight"), part


def read_floats(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of every tensor of a file as a checkpoint of transformers has it, float32 where in blocks.

    Raises FormatError for a file that is damaged, or that holds a tensor this reader does not know.
    """
    for name, part in read_parts(GgufFile(path)):
        yield name, part.dequantize() if isinstance(part, BlockTensor) else part
