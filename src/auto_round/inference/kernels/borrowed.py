"""Kernels of other packages: what they compute from, and the proof that they compute what the codes say.

Their order of weights cannot be read back, so the stored tensors stay on the host, where saving finds them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from auto_round.errors import BackendError
from auto_round.inference.backends.torch_reference import BACKEND as REFERENCE
from auto_round.inference.base import Stored
from auto_round.qtensor import QTensor

PROBE_ROWS = 16
# Of a product, relative to its size. Sums in float16 differ by less; a wrong order of weights or scales by about 1.
TOLERANCE = 0.02


@dataclass(frozen=True)
class Borrowed:
    """A layer in the hands of another package.

    multiply: x (rows, in) -> x @ W^T (rows, out), both of dtype `dtype`. kept: what the file holds, on the host.
    """

    multiply: Callable[[Tensor], Tensor]
    dtype: torch.dtype
    kept: Stored

    @classmethod
    def of(cls, name: str, stored: Stored, dtype: torch.dtype, multiply: Callable[[Tensor], Tensor]) -> Borrowed:
        """Take `multiply` over, if it gives what `stored` says; raise BackendError naming the backend if not."""
        require_agreement(name, stored, dtype, multiply)
        kept = {key: tensor.cpu() for key, tensor in stored.tensors.items()}
        return cls(multiply, dtype, replace(stored, tensors=kept))

    def qtensor(self) -> QTensor:
        """Decode the codes, on the host."""
        return self.kept.qtensor()

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x (..., in) of any float dtype -> (..., out)."""
        rows = x.reshape(-1, x.shape[-1]).to(self.dtype).contiguous()  # kernels go by the pointer alone
        y = self.multiply(rows).to(x.dtype).view(*x.shape[:-1], self.kept.out_features)
        return y if bias is None else y + bias.to(x.dtype)


@torch.no_grad()
def require_agreement(name: str, stored: Stored, dtype: torch.dtype, multiply: Callable[[Tensor], Tensor]) -> None:
    """Raise BackendError unless `multiply` gives random inputs (PROBE_ROWS, in) the products of the stored weight."""
    device = stored.tensors["scales"].device
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(PROBE_ROWS, stored.in_features, generator=generator).to(device, dtype)
    expected = REFERENCE.linear(x, stored, None).double()
    error = float((multiply(x).double() - expected).norm() / expected.norm().clamp_min(torch.finfo(dtype).tiny))
    if not error < TOLERANCE:
        raise BackendError(
            f"backend {name!r} gives wrong products on {device} (relative error {error:.2g} for "
            f"{stored.scheme.name}, {stored.out_features} x {stored.in_features}); load with "
            "AutoRoundConfig(backend='triton') or 'torch', and tell us the versions of torch and of that package"
        )
