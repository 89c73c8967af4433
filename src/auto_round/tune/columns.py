"""Rounding and coordinate descent over a run of columns, by ``columns.c`` where it was compiled.

Elsewhere and on other devices the same comes from `numerics.compensate`, some calls of torch for every column.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from auto_round.numerics import compensate
from auto_round.numerics.compensate import Compensation, Run
from auto_round.runtime.compiled import library_if_built

ABI = 1
OUTPUTS_PER_THREAD = 64


@dataclass(frozen=True)
class Loops:
    """The compiled loops, and how many of `compiled.PATHS` this CPU has."""

    round: Any
    descend: Any
    paths: int


@functools.cache
def compiled_loops() -> Loops | None:
    """The compiled loops, or None where they were not built."""
    library = library_if_built(Path(__file__).parent, "_columns", "auto_round_columns_abi", ABI)
    if library is None:
        return None
    pointers, sizes, numbers = [ctypes.c_void_p] * 7, [ctypes.c_int64] * 2, [ctypes.c_int] * 2
    for loop in (library.auto_round_round, library.auto_round_descend):
        loop.argtypes = [*pointers, *sizes, ctypes.c_float, *numbers]
        loop.restype = None
    return Loops(library.auto_round_round, library.auto_round_descend, int(library.auto_round_columns_paths()))


def rounded_codes(
    weight: Tensor, scale: Tensor, zero: Tensor, width: int, max_code: int, known: Compensation
) -> Tensor:
    """Error-compensated codes, improved by coordinate descent; see `compensate.compensated_codes`."""
    codes = compensate.compensated_codes(weight, scale, zero, width, max_code, known, round_run)
    return compensate.descended(weight, codes, scale, zero, width, max_code, known, descend_run)


def round_run(values: Tensor, run: Run, path: int | None = None) -> Tensor:
    """See `compensate.round_run`; path: one of `compiled.PATHS` that the CPU has, for tests."""
    found = compiled_loops()
    if found is None or values.device.type != "cpu":
        return compensate.round_run(values, run)
    moves = torch.empty_like(values)
    held = (values, moves, *_fields(run), run.zero.contiguous(), run.group)
    found.round(*(t.data_ptr() for t in held), *_numbers(values, run, found, path))
    return moves


def descend_run(pull: Tensor, codes: Tensor, run: Run, path: int | None = None) -> Tensor:
    """See `compensate.descend_run`."""
    found = compiled_loops()
    if found is None or pull.device.type != "cpu":
        return compensate.descend_run(pull, codes, run)
    moves = torch.empty_like(codes)
    held = (pull, codes, moves, *_fields(run), run.group)
    found.descend(*(t.data_ptr() for t in held), *_numbers(pull, run, found, path))
    return moves


def _fields(run: Run) -> tuple[Tensor, Tensor, Tensor]:
    return run.lower.contiguous(), run.diagonal.contiguous(), run.scale.contiguous()


def _numbers(values: Tensor, run: Run, found: Loops, path: int | None) -> tuple[int, int, int, int, int]:
    """Columns, outputs, largest code, path, threads."""
    count, outputs = values.shape
    threads = min(torch.get_num_threads(), 1 + outputs // OUTPUTS_PER_THREAD)
    return count, outputs, run.max_code, found.paths - 1 if path is None else path, threads
