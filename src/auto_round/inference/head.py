"""Rounding an output head to few bits while a model is loaded: it is not tuned, and it is not written back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from auto_round.errors import BackendError
from auto_round.inference.base import Packing
from auto_round.inference.qlinear import QLinear
from auto_round.inference.select import choose
from auto_round.numerics.groups import from_groups, to_groups
from auto_round.numerics.integer import quantise, storable, sym_anchor
from auto_round.qtensor import QTensor
from auto_round.spec.scheme import Scheme

GROUP_SIZE = 128
ROWS_AT_ONCE = 4096


class TransientLinear(nn.Module):
    """A quantised head that exists in memory only.

    tied: the weight it was made from is the embedding's, which is still there and is saved as ever. dtype: its own.
    """

    def __init__(self, inner: QLinear, tied: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner = inner
        self.tied = tied
        self.weight = torch.empty(0, dtype=dtype)  # for forwards that ask for its dtype

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        y: Tensor = self.inner(x.to(self.inner.device))  # a hook that did so was of the head in whose place it is
        return y

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Hand on what belongs to the file: nothing. Raises BackendError when the file's own head is gone."""
        if not self.tied:
            raise BackendError(
                "this model was loaded with lm_head_bits, so its own output head is not in memory and cannot be saved; "
                "load it again without lm_head_bits"
            )
        return kwargs.get("destination", {})


def round_head(model: Any, bits: int, layout: Packing, spelling: str) -> str | None:
    """Put a head of `bits` bits in place of `model`'s output embedding; return its backend's name.

    None when there is nothing to do: the file holds it quantised already. Raises BackendError when the model has no
    such head or only the reference backend could run it, which is slower than the head as it is.
    """
    name, head = _find(model)
    if isinstance(head, QLinear):
        return None
    scheme = Scheme(bits, GROUP_SIZE)
    weight = head.weight
    backend = choose(spelling, name, scheme, (weight.shape[0], weight.shape[1]), weight.dtype, weight.device)
    if not backend.repacks:
        raise BackendError(
            f"lm_head_bits={bits} needs a compiled backend, and {backend.name} is none; see auto-round backends"
        )
    tied = any(p is weight for n, p in model.named_parameters() if n != f"{name}.weight")
    codes = nearest(weight.detach(), scheme)
    inner = QLinear.from_qtensor(codes, layout, backend, head.bias, name, asked=spelling, dtype=weight.dtype)
    parent = model.get_submodule(name.rpartition(".")[0])
    setattr(parent, name.rpartition(".")[2], TransientLinear(inner, tied, weight.dtype))
    return backend.name


def nearest(weight: Tensor, scheme: Scheme) -> QTensor:
    """(out, in), any float -> its symmetric codes by rounding to nearest, a few thousand outputs at a time."""
    codes, scales = [], []
    for rows in weight.split(ROWS_AT_ONCE):
        grouped = to_groups(rows.float(), scheme.group_width(weight.shape[1]))
        scale = storable(sym_anchor(grouped, scheme.bits))
        zero = torch.tensor(float(scheme.mid_code), device=weight.device)
        code = quantise(grouped, None, scale, zero, scheme.max_code)
        codes.append(from_groups(code, weight.shape[1]).to(torch.uint8))
        scales.append(scale.squeeze(-1).half())
    return QTensor(torch.cat(codes), torch.cat(scales), None, scheme)


def _find(model: Any) -> tuple[str, Any]:
    """The output head and its full name."""
    head = model.get_output_embeddings()
    found = next((name for name, module in model.named_modules() if module is head), None)
    if found is None or not (isinstance(head, QLinear) or type(head) is nn.Linear):
        raise BackendError(f"lm_head_bits: {type(model).__name__} has no Linear as its output head; leave it out")
    return found, head
