"""What a model-level format is: it says what it cannot hold before any work, writes a model, and opens one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from auto_round.qtensor import BlockTensor, QTensor
from auto_round.source.checkpoint import Checkpoint
from auto_round.spec.blocks import BlockScheme
from auto_round.spec.plan import LinearShape, Plan
from auto_round.spec.scheme import Scheme


@dataclass(frozen=True)
class Export:
    """All that a format needs to write a model.

    checkpoint: the source's tensors; config: its config.json as parsed, without a quantization_config; plan: what is
    quantised; stored_names: layer name -> name of its weight, also where the source holds codes instead; replaced:
    source tensor -> the layer whose own tensors stand in its place; tensor: the codes of a layer; weight: its weight
    (out, in) float32; extra: files to copy beside the weights; provenance: what made the model (iters, seed, data),
    recorded in the folder. act_order: some codes have a g_idx. transposed: layers whose source tensor is (in, out).
    title: what the user called the model; tokenizer: as transformers loads it, None when there is none. blocks: a
    layer's GGUF blocks, where layers were quantised in such.
    """

    checkpoint: Checkpoint
    config: Mapping[str, Any]
    plan: Plan
    stored_names: Mapping[str, str]
    replaced: Mapping[str, str]
    tensor: Callable[[str], QTensor]
    weight: Callable[[str], Tensor]
    extra: tuple[Path, ...]
    provenance: Mapping[str, Any]
    act_order: bool = False
    transposed: frozenset[str] = frozenset()
    title: str = "model"
    tokenizer: Any | None = None
    blocks: Callable[[str], BlockTensor] | None = None


def other_names(export: Export) -> dict[str, str]:
    """Layer -> the name under which its tensors lie, where that is another: some readers ask by this one."""
    stored = {name: tensor.removesuffix(".weight") for name, tensor in export.stored_names.items()}
    return {name: tensor for name, tensor in stored.items() if tensor != name}


@dataclass(frozen=True)
class CodedLayer:
    """One quantised layer as it lies in its files.

    kind: its scheme in words, such as "W4A16G128" or "Q4_K". scheme: None where no `Scheme` says it. tensors: names of
    the tensors it is stored in. act_order: inputs of a group are not neighbours.
    """

    name: str
    kind: str
    scheme: Scheme | None
    out_features: int
    in_features: int
    nbytes: int
    tensors: tuple[str, ...]
    act_order: bool = False


@dataclass(frozen=True)
class CodedModel:
    """A quantised model, opened without reading its codes.

    path: folder or file. format: name in the registry under which it would be written like this; detail: what else
    there is to say about how it is packed. config: config.json without its quantization_config. checkpoint: all stored
    tensors, codes and others. layers: by name as in the file. block_lists: names of the lists of blocks.
    codes: the codes of a layer, raising FormatError where it has none that a `QTensor` holds. weight: a layer's
    weight (out, in) float32. extra: the other files. settings: quantization_config or its like. not_in_config: what
    the config leaves out, without which it describes another model.
    """

    path: Path
    format: str
    detail: str
    config: Mapping[str, Any]
    checkpoint: Checkpoint
    layers: Mapping[str, CodedLayer]
    block_lists: tuple[str, ...]
    codes: Callable[[str], QTensor]
    weight: Callable[[str], Tensor]
    extra: tuple[Path, ...]
    settings: Mapping[str, Any]
    not_in_config: str | None = None


def takes_the_users(
    self: object, layers: Sequence[LinearShape], config: Mapping[str, Any], tokenizer: Any | None
) -> Mapping[str, BlockScheme | None]:
    """`Format.prescribe` of a format without schemes of its own: the user's are taken."""
    return {}


class Format(Protocol):
    """One format. `name` is what users type; holds_act_order: its codes may have a g_idx. holds_conv1d: its readers
    put a quantised layer also in the place of GPT-2's Conv1D, not of Linears alone. holds_tokenizer: the tokenizer is a
    part of the weights' file."""

    name: str
    holds_act_order: bool
    holds_conv1d: bool
    holds_tokenizer: bool

    def prescribe(
        self, layers: Sequence[LinearShape], config: Mapping[str, Any], tokenizer: Any | None
    ) -> Mapping[str, BlockScheme | None]:
        """Give the schemes by layer that the format itself prescribes, None to keep; empty to take the user's.

        config: config.json as parsed. Raises FormatError, before any work, for a model the format cannot hold at all.
        """
        ...

    def refuse(self, shape: LinearShape, scheme: Scheme) -> str | None:
        """Say why the format cannot hold such a layer, or None. Asked before any work."""
        ...

    def check(self, plan: Plan) -> None:
        """Raise FormatError when the format cannot hold the plan as a whole. Asked before any work."""
        ...

    def settings(self, plan: Plan) -> Mapping[str, Any]:
        """The quantization_config that `write` will give a plan, without provenance; empty where a format has none."""
        ...

    def sizes(self, export: Export, largest_shard: int | None) -> Mapping[str, int]:
        """Tell the weight files that `write` will make and the exact bytes of each, without asking for any codes.

        largest_shard: bytes of a file; None for what the format's readers are used to.
        """
        ...

    def write(self, export: Export, folder: Path, largest_shard: int | None) -> None:
        """Write the model into the empty folder `folder`."""
        ...

    def prove(self, export: Export, folder: Path) -> None:
        """Read back what `write` wrote; raise FormatError naming a layer that does not give exactly its codes."""
        ...

    def open(self, path: Path, scratch: Path) -> CodedModel | None:
        """Open a folder or file of this format; None if it is of another. scratch: where to unpack what has to be.

        Raises SourceError or FormatError naming file and tensor when it is damaged or its config disagrees with it.
        """
        ...
