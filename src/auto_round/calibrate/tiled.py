"""The attention of `attention.c`: float32 on CPUs, where it was compiled."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from auto_round.runtime.compiled import library_if_built, pointer

ABI = 1
WIDTHS = 16  # a head's width is a multiple of it


@dataclass(frozen=True)
class Functions:
    """The compiled functions, and how many of `compiled.PATHS` this CPU has."""

    forward: Any
    backward: Any
    room: Any
    paths: int


@functools.cache
def compiled_attention() -> Functions | None:
    """The compiled functions, or None where they were not built."""
    library = library_if_built(Path(__file__).parent, "_attention", "auto_round_attention_abi", ABI)
    if library is None:
        return None
    forward, backward, room = (
        library.auto_round_attention,
        library.auto_round_attention_back,
        library.auto_round_attention_room,
    )
    address, number = ctypes.c_void_p, ctypes.c_int
    rest: list[Any] = [ctypes.c_float, number, address, number, number]
    forward.argtypes, backward.argtypes = [*[address] * 8, *rest], [*[address] * 12, *rest]
    forward.restype = backward.restype = None
    room.argtypes, room.restype = [ctypes.c_int64] * 3, ctypes.c_int64
    return Functions(forward, backward, room, int(library.auto_round_attention_paths()))


def fits(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """True where `TiledAttention` takes these; inside of torch.compile it takes none."""
    batch, heads, _, width = query.shape
    keys = (batch, key.shape[1], key.shape[2])
    alike = key.shape == (*keys, width) and value.shape[:3] == keys and heads % max(1, keys[1]) == 0
    whole = not any(size % WIDTHS for size in (width, value.shape[-1])) and all(
        (*query.shape, *key.shape, *value.shape)
    )
    here = all(t.device.type == "cpu" for t in (query, key, value, query if mask is None else mask))
    floats = query.dtype == key.dtype == value.dtype == torch.float32
    fitting = alike and whole and here and floats
    return fitting and not torch.compiler.is_compiling() and compiled_attention() is not None


class TiledAttention(torch.autograd.Function):
    """softmax(Q K^T * scale + mask) V, see `blocked_attention`; path: one of `compiled.PATHS` that the CPU has."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        causal: bool,
        scale: float,
        path: int | None = None,
    ) -> Tensor:
        """Return (batch, heads, queries, width), in memory by tokens as models go on with it."""
        found = compiled_attention()
        assert found is not None
        query, key, value = (_rows(t) for t in (query, key, value))
        output = _by_tokens(query, value.shape[-1])
        sums = query.new_empty(*query.shape[:-1], 2)
        held, room = (query, key, value, _added(mask, query, key), output), _room(found, query, key, value)
        ctx.settings = float(scale), causal
        ctx.path = found.paths - 1 if path is None else path
        found.forward(
            *map(pointer, (*held, sums)),
            _sizes(query, key, value),
            _strides(*held),
            *ctx.settings,
            room.data_ptr(),
            ctx.path,
            len(room),
        )
        ctx.save_for_backward(query, key, value, mask, output, sums)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of queries, keys and values."""
        found = compiled_attention()
        assert found is not None
        query, key, value, mask, output, sums = ctx.saved_tensors
        along, grad, mask = (grad * output).sum(-1).contiguous(), _rows(grad), _added(mask, query, key)
        for_query = _by_tokens(query, query.shape[-1])
        # Heads that share keys each have gradients of their own, so that threads never write the same place.
        room = _room(found, query, key, value)
        for_key, for_value = (query.new_zeros(*query.shape[:2], *t.shape[2:]) for t in (key, value))
        found.backward(
            *map(pointer, (query, key, value, mask, sums, grad, along, for_query, for_key, for_value)),
            _sizes(query, key, value),
            _strides(query, key, value, mask, grad, for_query, for_key, for_value),
            *ctx.settings,
            room.data_ptr(),
            ctx.path,
            len(room),
        )
        return (for_query, _of_all(for_key, key), _of_all(for_value, value), *[None] * 4)


def _rows(values: Tensor) -> Tensor:
    """The same with rows that lie in one piece."""
    return values if values.stride(-1) == 1 else values.contiguous()


def _of_all(gradients: Tensor, like: Tensor) -> Tensor:
    """The sum over the heads that share keys."""
    return gradients if gradients.shape == like.shape else gradients.unflatten(1, (like.shape[1], -1)).sum(2)


def _by_tokens(like: Tensor, width: int) -> Tensor:
    batch, heads, tokens = like.shape[:3]
    return like.new_empty(batch, tokens, heads, width).transpose(1, 2)


def _added(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """What a mask adds to the scores: (batch, heads, queries, keys) float32, rows that are the same being one."""
    if mask is None:
        return None
    for dim in range(mask.dim() - 1):
        mask = mask.narrow(dim, 0, 1) if mask.stride(dim) == 0 else mask
    if mask.dtype == torch.bool:
        mask = mask.new_zeros(mask.shape, dtype=torch.float32).masked_fill_(~mask, -torch.inf)
    keys = key.shape[2]
    mask = mask.float().expand(*mask.shape[:-1], keys).contiguous()
    return mask.expand(*query.shape[:3], keys)


def _sizes(query: Tensor, key: Tensor, value: Tensor) -> Any:
    """What `attention.c` calls sizes."""
    batch, heads, queries, width = query.shape
    return _numbers(batch, heads, heads // key.shape[1], queries, key.shape[2], width, value.shape[-1])


def _strides(*tensors: Tensor | None) -> Any:
    return _numbers(*(step for t in tensors for step in ((0, 0, 0) if t is None else t.stride()[:3])))


def _numbers(*values: int) -> Any:
    return (ctypes.c_int64 * len(values))(*values)


def _room(found: Functions, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """(threads, values) of memory that each of them needs for itself."""
    threads = min(torch.get_num_threads(), query.shape[0] * query.shape[1])
    return query.new_empty(threads, found.room(key.shape[2], key.shape[-1], value.shape[-1]))
