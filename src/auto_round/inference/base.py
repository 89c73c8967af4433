"""The seam between a quantised layer and the code that multiplies with it.

Life of a layer: the module is made on the meta device with the tensors of its file (`Stored`), a backend is chosen with
`supports`, the file is read, `prepare` turns the stored tensors into what the backend computes from, `linear` runs.
Some backends compute from the stored tensors as they are. For one that repacks, the stored tensors are freed after
`prepare`, and `Prepared.qtensor` gives the codes back when the model is saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from auto_round.qtensor import QTensor
from auto_round.spec.scheme import Scheme

ROW_MULTIPLE = 32


@dataclass(frozen=True)
class Reason:
    """Why a backend cannot run a layer, and what to do about it; install: the command, if only software is missing."""

    text: str
    fix: str
    install: str | None = None

    def __str__(self) -> str:
        return f"{self.text}; {self.fix}" + (f": {self.install}" if self.install else "")


class Packing(Protocol):
    """How the tensors of one layer lie in its file, outputs along the last dimension of each."""

    def specs(
        self, scheme: Scheme, out_features: int, in_features: int
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Return {tensor name: (dtype, shape)}."""
        ...

    def encode(self, tensor: QTensor) -> dict[str, Tensor]:
        """Return the tensors as they go to disk."""
        ...

    def decode(self, tensors: Mapping[str, Tensor], scheme: Scheme, in_features: int) -> QTensor:
        """Rebuild the codes from the tensors."""
        ...


@dataclass(frozen=True)
class Stored:
    """One layer as its file holds it: `tensors` are those of ``packing.specs(scheme, out_features, in_features)``."""

    packing: Packing
    scheme: Scheme
    out_features: int
    in_features: int
    tensors: Mapping[str, Tensor]

    @classmethod
    def of(cls, tensor: QTensor, packing: Packing) -> Stored:
        """Encode `tensor` in `packing`."""
        return cls(packing, tensor.scheme, tensor.out_features, tensor.in_features, packing.encode(tensor))

    def qtensor(self) -> QTensor:
        """Decode the whole layer: in_features * out_features bytes of codes."""
        return self.packing.decode(self.tensors, self.scheme, self.in_features)

    def rows(self, begin: int, end: int) -> QTensor:
        """Decode outputs begin .. end-1 only; both must be multiples of 32, where packed words start."""
        return self.packing.decode(
            {name: _columns(t, begin, end, self.out_features) for name, t in self.tensors.items()},
            self.scheme,
            self.in_features,
        )


def _columns(tensor: Tensor, begin: int, end: int, out_features: int) -> Tensor:
    """(rows, n) -> (rows, n * (end - begin) / out_features): the part of the outputs begin .. end-1."""
    width = tensor.shape[-1]
    return tensor[..., width * begin // out_features : width * end // out_features]


class Prepared(Protocol):
    """What a backend computes from. It owns its tensors and can give the codes back."""

    def qtensor(self) -> QTensor:
        """Return the codes, bit-identical to those that were prepared."""
        ...


P = TypeVar("P", bound=Prepared)


def tracing() -> bool:
    """True while torch.jit.trace records what is called: operators, not what a kernel called through ctypes does."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]  # torch does not export it


class Backend(Protocol[P]):
    """One way to multiply with a quantised weight. Stateless; all state of a layer is in its `Prepared`.

    name: the file's name. repacks: `prepare` makes a form of its own, in place of the stored tensors.
    rank: of the backends that can run a layer, the one of highest rank does. spellings: what users may write for it in
    ``AutoRoundConfig(backend=...)`` besides its name.
    """

    name: str
    repacks: bool
    rank: int
    spellings: tuple[str, ...]

    def supports(
        self, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
    ) -> Reason | None:
        """Say why a layer of shape (out, in), with inputs of `dtype` on `device`, cannot be run, or None."""
        ...

    def prepare(self, stored: Stored, dtype: torch.dtype) -> P:
        """Turn a loaded layer into what `linear` needs for inputs that mostly have `dtype`.

        Called once a layer by a backend that repacks. The others return `stored` and get it in each call.
        """
        ...

    def linear(self, x: Tensor, prepared: P, bias: Tensor | None) -> Tensor:
        """x (..., in), bias (out) or None -> x @ W^T + bias (..., out) in the dtype of x, which may be any float.

        No gradient has to be recorded; see `differentiable_linear`.
        """
        ...
