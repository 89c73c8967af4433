"""The compiled kernel of ``native.c``: found beside this file, called through ctypes, known to torch as an operator.

It is built with the package where there is a C compiler. Activations become fixed point, with a step for every token
and 128 inputs: 13 bits and the sign for bfloat16 and float16, 20 for float32; beyond that only float32 sums are
rounded. The relative error of a product is below 3e-4 and 4e-6, finer than the dtype of the result, whatever the
instruction set.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from auto_round.inference.base import Reason
from auto_round.inference.kernels.tiles import Tiles
from auto_round.runtime.compiled import REINSTALL, NotCompiledError, load_library

ABI = 2
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
INSTRUCTION_SETS = ("plain C", "AVX2", "AVX-VNNI", "AVX-512 VNNI")
BYTES_PER_THREAD = 1 << 14  # below this a second thread costs more than it saves


@dataclass(frozen=True)
class Library:
    """The loaded kernel and the instruction sets of this CPU that it can use, indices into INSTRUCTION_SETS."""

    linear: Any
    dense: Any
    isas: tuple[int, ...]


@functools.cache
def library() -> Library | Reason:
    """Load the compiled kernel; the reason says why there is none and what to do."""
    try:
        loaded = load_library(Path(__file__).parent, "_native", "auto_round_abi", ABI)
    except NotCompiledError as error:
        return Reason(str(error), error.fix, REINSTALL)
    function = loaded.auto_round_linear
    function.argtypes = [ctypes.c_void_p] * 6 + [ctypes.c_int64] * 4 + [ctypes.c_int] * 4
    dense = loaded.auto_round_dense
    dense.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 2 + [ctypes.c_int] * 2
    paths = int(loaded.auto_round_paths())
    return Library(function, dense, tuple(i for i in range(len(INSTRUCTION_SETS)) if paths >> i & 1))


def native_linear(x: Tensor, tiles: Tiles, bias: Tensor | None, isa: int | None = None) -> Tensor:
    """x (..., in) on the CPU, bias (out) of the same dtype or None -> (..., out); no gradient is recorded.

    isa: an instruction set that the CPU has, for tests. Raises RuntimeError when the kernel was not built.
    """
    return _multiply(x, tiles.codes, tiles.scales, tiles.zeros, bias, *_numbers(tiles), isa)


def _multiply(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_width: int,
    out_features: int,
    in_features: int,
    isa: int | None = None,
) -> Tensor:
    found = library()
    if isinstance(found, Reason):
        raise RuntimeError(str(found))
    x = x.contiguous()
    y = x.new_empty((*x.shape[:-1], out_features))
    failed = found.linear(
        x.data_ptr(),
        codes.data_ptr(),
        scales.data_ptr(),
        None if zeros is None else zeros.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        x.numel() // in_features,
        in_features,
        out_features,
        group_width,
        bits,
        DTYPES[x.dtype],
        found.isas[-1] if isa is None else isa,
        min(torch.get_num_threads(), 1 + codes.numel() // BYTES_PER_THREAD),
    )
    if failed:
        raise MemoryError(f"no memory for the fixed-point form of activations of shape {tuple(x.shape)}")
    return y


def _numbers(tiles: Tiles) -> tuple[int, int, int, int]:
    scheme = tiles.scheme
    return scheme.bits, scheme.group_width(tiles.in_features), tiles.out_features, tiles.in_features


def reference_linear(x: Tensor, tiles: Tiles, bias: Tensor | None) -> Tensor:
    """The twin of `native_linear` in plain torch: dequantised in float32 or float64."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    weight = tiles.qtensor().dequantize(dtype)
    return linear(x.to(dtype), weight, None if bias is None else bias.to(dtype)).to(x.dtype)


# The operator takes the fields of `Tiles` one by one, as torch's schemas know tensors and numbers only. Its gradient is
# not registered with it (see `differentiable_linear`): that would cost every call 10 us and more, wanted or not.
_OPERATOR = "auto_round::tiles_linear"
torch.library.define(
    _OPERATOR,
    "(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, Tensor? bias, int bits, int group_width, int out_features, "
    "int in_features) -> Tensor",
)
torch.library.impl(_OPERATOR, "cpu", _multiply)


def _shape(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_width: int,
    out_features: int,
    in_features: int,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


torch.library.register_fake(_OPERATOR, _shape)


def operator_linear(x: Tensor, tiles: Tiles, bias: Tensor | None) -> Tensor:
    """`native_linear` as the operator ``auto_round::tiles_linear``, for torch.compile and jit.trace; no gradient."""
    y: Tensor = torch.ops.auto_round.tiles_linear(x, tiles.codes, tiles.scales, tiles.zeros, bias, *_numbers(tiles))
    return y


def native_dense(x: Tensor, weight: Tensor, bias: Tensor | None, isa: int | None = None) -> Tensor:
    """One token x (..., in) times a dense weight (out, in), bias (out) or None, all bfloat16 on the CPU -> (..., out).

    Summed in float32; no gradient is recorded. isa: as above. Raises RuntimeError when the kernel was not built.
    """
    found = library()
    if isinstance(found, Reason):
        raise RuntimeError(str(found))
    x, weight = x.contiguous(), weight.contiguous()
    out_features, in_features = weight.shape
    y = x.new_empty((*x.shape[:-1], out_features))
    failed = found.dense(
        x.data_ptr(),
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        in_features,
        out_features,
        found.isas[-1] if isa is None else isa,
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError(f"no memory for {in_features} activations")
    return y


_DENSE = "auto_round::dense_token"
torch.library.define(_DENSE, "(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
torch.library.impl(_DENSE, "cpu", native_dense)
torch.library.register_fake(_DENSE, lambda x, weight, bias: x.new_empty(*x.shape[:-1], weight.shape[0]))


def operator_dense(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`native_dense` as the operator ``auto_round::dense_token``, for torch.compile; it has no gradient."""
    y: Tensor = torch.ops.auto_round.dense_token(x, weight, bias)
    return y
