"""What blocks leave for later ones beside the hidden states: keys and values that several layers share.

A model hands one empty mapping to all its blocks; some write to it, later ones read. Block by block, each call gets a
`Handed` in its place, behind which lies what a chain's earlier blocks left for the samples at hand.
"""

from __future__ import annotations

from collections import UserDict
from typing import Any

from torch import Tensor

from auto_round.calibrate.front import Walk, store
from auto_round.errors import SourceError


class Left:
    """Values by key for all samples, as blocks left them in one chain; they lie where activations do."""

    def __init__(self, name: str, samples: int, settings: Walk) -> None:
        self._name, self._samples, self._settings = name, samples, settings
        self.values: dict[Any, tuple[Tensor, ...]] = {}

    def view(self, rows: Tensor) -> Handed:
        """What a block is handed for the samples `rows`, int64 indices."""
        return Handed(self, rows)

    def of(self, key: Any, rows: Tensor) -> tuple[Tensor, ...]:
        """The values under `key` for the samples `rows`, on the computing device; KeyError when there are none."""
        return tuple(value[rows.to(value.device)].to(self._settings.device) for value in self.values[key])

    def keep(self, handed: Handed) -> None:
        """Take over what a block has written.

        Raises SourceError when it is no tuple of tensors that begin with the dimension of samples, or was read as well.
        """
        for key, value in handed.data.items():
            parts = value if isinstance(value, tuple) else ()
            follow = [isinstance(part, Tensor) and part.shape[:1] == (len(handed.rows),) for part in parts]
            if not follow or not all(follow) or key in handed.read:
                raise SourceError(
                    f"a block leaves {key!r} for later ones in a way that is not known here. Recipe rtn rounds a model "
                    "without running it"
                )
            if key not in self.values:
                names = (f"{self._name}-{len(self.values)}-{i}" for i in range(len(parts)))
                self.values[key] = tuple(
                    store((self._samples, *part.shape[1:]), part.dtype, self._settings, name)
                    for part, name in zip(parts, names, strict=True)
                )
            for whole, part in zip(self.values[key], parts, strict=True):
                whole[handed.rows.to(whole.device)] = part.detach().to(whole.device)


class Handed(UserDict[Any, Any]):
    """A mapping that reads what was left and holds what is written now. rows: the samples; read: keys asked for."""

    def __init__(self, left: Left, rows: Tensor) -> None:
        super().__init__()
        self._left, self.rows, self.read = left, rows, set[Any]()

    def __missing__(self, key: Any) -> tuple[Tensor, ...]:
        self.read.add(key)
        return self._left.of(key, self.rows)

    def __contains__(self, key: object) -> bool:
        return key in self.data or key in self._left.values
