"""A tuning step's elementwise passes over one Linear, each in one read of its operands where ``passes.c`` was compiled.

Elsewhere, on other devices and for other dtypes, the same comes from torch, a chunk of rows at a time.
"""

from __future__ import annotations

import ctypes
import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from auto_round.numerics.groups import from_groups, to_groups
from auto_round.numerics.integer import fake_quantise, gradients
from auto_round.runtime.compiled import library_if_built, pointer

ABI = 2
DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # of W' and its gradient
ROW_CHUNK = 1 << 17  # weights in one pass of torch: what a core's cache holds of all its operands
BETAS = (0.3, 0.95)  # of the running means of V's gradient and of its square
TINY = 1e-30  # keeps 0 / 0 away; as in passes.c
WEIGHTS_PER_THREAD = 1 << 14  # below this a second thread costs more than it saves


@dataclass(frozen=True)
class Passes:
    """The compiled passes, and how many of `compiled.PATHS` this CPU has."""

    build: Any
    step: Any
    paths: int


@functools.cache
def compiled_passes() -> Passes | None:
    """The compiled passes, or None where they were not built."""
    library = library_if_built(Path(__file__).parent, "_passes", "auto_round_passes_abi", ABI)
    if library is None:
        return None
    pointers, numbers, floats = [ctypes.c_void_p], [ctypes.c_int64], [ctypes.c_float]
    build, step = library.auto_round_build, library.auto_round_step
    build.argtypes = [*pointers * 6, *numbers * 4, *floats, *[ctypes.c_int] * 3]
    step.argtypes = [*pointers * 12, *numbers * 4, *floats * 3, *[ctypes.c_int] * 3]
    build.restype = step.restype = None
    return Passes(build, step, int(library.auto_round_passes_paths()))


@dataclass(frozen=True)
class Grids:
    """The grid of every group of a Linear: scale, zero and, for grids that have a minimum of their own, low.

    Each (out, groups, 1) float32; the group's weights meet the grid with `low` added.
    """

    scale: Tensor
    zero: Tensor
    max_code: int
    low: Tensor | None = None

    def fields(self, rows: slice) -> tuple[Tensor, Tensor, int]:
        """What `integer` wants for these rows."""
        return self.scale[rows], self.zero[rows], self.max_code

    def met(self, weight: Tensor, rows: slice) -> Tensor:
        """These rows of a weight (out, groups, width), with `low` added."""
        return weight[rows] if self.low is None else weight[rows] + self.low[rows]


@dataclass
class Motion:
    """Running means of V's gradient and of its square, (out, groups, width) bfloat16, and how many steps so far."""

    first: Tensor
    second: Tensor
    steps: int = 0

    @classmethod
    def of(cls, offset: Tensor) -> Motion:
        """Before the first step of `offset`."""
        zeros = torch.zeros(2, *offset.shape, dtype=torch.bfloat16, device=offset.device)
        return cls(zeros[0], zeros[1])

    def correction(self) -> float:
        """What the ratio first / sqrt(second) is multiplied by, since both began at 0."""
        return math.sqrt(1 - BETAS[1] ** self.steps) / (1 - BETAS[0] ** self.steps)


def build_weight(weight: Tensor, offset: Tensor, grids: Grids, out: Tensor, path: int | None = None) -> None:
    """Put W' = s * (q - z) - low into `out` (out, in), rounded to its dtype.

    weight, offset: (out, groups, width) float32. path: one of `compiled.PATHS` that the CPU has, for tests.
    """
    found = compiled_passes()
    if found is None or not _fits(weight, out):
        for rows in row_chunks(weight):
            fake = fake_quantise(grids.met(weight, rows), offset[rows], *grids.fields(rows))
            if grids.low is not None:
                fake.sub_(grids.low[rows])
            out[rows].copy_(from_groups(fake, out.shape[1]))
        return
    held = _held(weight, offset, grids)
    found.build(
        *map(pointer, held),
        out.data_ptr(),
        *_shape(weight, out),
        grids.max_code,
        DTYPES[out.dtype],
        found.paths - 1 if path is None else path,
        _threads(weight),
    )


def step_offsets(
    weight: Tensor, offset: Tensor, motion: Motion, grids: Grids, grad: Tensor, lr: float, path: int | None = None
) -> tuple[Tensor, Tensor]:
    """Move V by at most `lr` against its gradient; return dL/ds and dL/dz, (out, groups, 1) float32.

    How far is told as in Adam (arXiv 1412.6980): the running mean of the gradient over the root of that of its square,
    both corrected for their beginning. It is 1 where gradients agree, and that is the most; where they take turns it is
    less. As `build_weight`; `offset` and what `motion` holds are contiguous and changed in place, grad = dL/dW' is
    (out, in) in any float dtype.
    """
    found = compiled_passes()
    motion.steps += 1
    if found is None or not _fits(weight, grad):
        parts = []
        for rows in row_chunks(weight):
            grouped = to_groups(grad[rows].float(), weight.shape[-1])
            slope, *others = gradients(grids.met(weight, rows), offset[rows], *grids.fields(rows), grouped)
            second = motion.second[rows].float().mul_(BETAS[1]).add_(slope.square().mul_(1 - BETAS[1]))
            first = motion.first[rows].float().mul_(BETAS[0]).add_(slope.mul_(1 - BETAS[0]))
            motion.first[rows], motion.second[rows] = first, second
            share = first.div_(_root(second).add_(TINY)).mul_(motion.correction()).clamp_(-1, 1)
            offset[rows].sub_(share.mul_(lr))
            parts.append(others)
        scale_grad, zero_grad = (torch.cat(part) for part in zip(*parts, strict=True))
        return scale_grad, zero_grad
    kept, taken = torch.tensor([BETAS, [1 - beta for beta in BETAS]], dtype=torch.float32)
    held = [*_held(weight, offset, grids), motion.first, motion.second, kept, taken]
    scale_grad, zero_grad = torch.empty_like(grids.scale), torch.empty_like(grids.scale)
    found.step(
        *map(pointer, held),
        grad.data_ptr(),
        scale_grad.data_ptr(),
        zero_grad.data_ptr(),
        *_shape(weight, grad),
        grids.max_code,
        lr,
        motion.correction(),
        DTYPES[grad.dtype],
        found.paths - 1 if path is None else path,
        _threads(weight),
    )
    return scale_grad, zero_grad


def row_chunks(weight: Tensor) -> list[slice]:
    """Row ranges of one pass of torch; one on accelerators, whose launches cost more than their caches save."""
    rows, per_row = weight.shape[0], weight[0].numel()
    size = rows if weight.device.type != "cpu" else max(1, ROW_CHUNK // per_row)
    return [slice(begin, begin + size) for begin in range(0, rows, size)]


def _root(values: Tensor) -> Tensor:
    """Square root of float32, exact as in C: torch's on a CPU is not, and not every device has float64."""
    return values.double().sqrt_().float() if values.device.type == "cpu" else values.sqrt()


def _fits(weight: Tensor, outer: Tensor) -> bool:
    return weight.device.type == "cpu" == outer.device.type and outer.dtype in DTYPES and outer.stride(1) == 1


def _held(weight: Tensor, offset: Tensor, grids: Grids) -> list[Tensor | None]:
    """Everything that both passes read, in the order of their arguments, contiguous."""
    low = None if grids.low is None else grids.low.contiguous()
    return [weight.contiguous(), offset, grids.scale.contiguous(), grids.zero.contiguous(), low]


def _shape(weight: Tensor, outer: Tensor) -> tuple[int, int, int, int]:
    """Rows, inputs, width of a group, and the stride of a row of the tensor that is not grouped."""
    return (*outer.shape, weight.shape[-1], outer.stride(0))


def _threads(weight: Tensor) -> int:
    return min(torch.get_num_threads(), 1 + weight.numel() // WEIGHTS_PER_THREAD)
