"""What a model-level format is: it says what it cannot hold before tuning, and writes and reads a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from auto_round.qtensor import QTensor
from auto_round.source.checkpoint import Checkpoint
from auto_round.spec.plan import LinearShape, Plan
from auto_round.spec.scheme import Scheme


@dataclass(frozen=True)
class Export:
    """All that a format needs to write a model.

    checkpoint: the source's tensors; config: its config.json as parsed; plan: what is quantised; stored_names: layer
    name -> name of its weight in the checkpoint; tensor: the codes of a layer; extra: files to copy beside the weights;
    provenance: what made the model (iters, seed, data), recorded in the folder.
    """

    checkpoint: Checkpoint
    config: Mapping[str, Any]
    plan: Plan
    stored_names: Mapping[str, str]
    tensor: Callable[[str], QTensor]
    extra: tuple[Path, ...]
    provenance: Mapping[str, Any]


class Format(Protocol):
    """One output format."""

    name: str

    def refuse(self, shape: LinearShape, scheme: Scheme) -> str | None:
        """Say why the format cannot hold such a layer, or None. Asked before any work."""
        ...

    def write(self, export: Export, folder: Path, largest_shard: int) -> None:
        """Write the model into the empty folder `folder`."""
        ...

    def read(self, folder: Path) -> Iterator[tuple[str, QTensor]]:
        """Yield (layer name as in the file, codes) of every quantised layer of a folder."""
        ...
