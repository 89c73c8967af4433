"""Attention on CPUs in blocks of queries: torch's function and its gradient, in about half the time of torch's kernel.

That kernel (2.13) takes a third of a tuning step in bfloat16, most of it in its backward pass. Here scores and softmax
are float32, the other products go in the inputs' dtype, and keys behind a causal block are left out. The backward pass
computes the scores again, so nothing of the size (queries, keys) is kept. In float32 `tiled` does the same in compiled
code.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from auto_round.calibrate import tiled

QUERIES = 64  # in a block, times the heads that share keys: its scores stay near a core's cache
DTYPES = (torch.float32, torch.bfloat16)


class BlockedAttention(TorchFunctionMode):
    """While it is on, `scaled_dot_product_attention` on a CPU in float32 or bfloat16 is `blocked_attention`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Take over the calls that `blocked_attention` can serve."""
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention and _serves(*args, **kwargs):
            return blocked_attention(*args, **kwargs)
        return func(*args, **kwargs)


def _serves(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    *others: Any,
    **rest: Any,
) -> bool:
    on_cpu = query.device.type == "cpu" and query.dtype in DTYPES and query.dtype == key.dtype == value.dtype
    shapes = [t.shape for t in (query, key, value)]
    batched = all(len(s) == 4 and s[0] == shapes[0][0] for s in shapes)
    fixed = attn_mask is None or not attn_mask.requires_grad
    return (
        on_cpu
        and batched
        and fixed
        and not dropout_p
        and shapes[1][1] == shapes[2][1]
        and shapes[0][1] % shapes[1][1] == 0
    )


def blocked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(Q K^T * scale + mask) V with the arguments of torch's `scaled_dot_product_attention`, without dropout.

    query: (batch, heads, queries, width); key, value: (batch, key heads, keys, width), heads a multiple of key heads.
    attn_mask: bool, True where a key counts, or added to the scores; a query that sees no key gives zeros.
    """
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    apply: Any = tiled.TiledAttention.apply if tiled.fits(query, key, value, attn_mask) else _Attention.apply
    output: Tensor = apply(query, key, value, attn_mask, is_causal, scale)
    return output


class _Block(NamedTuple):
    """A block of queries. Heads that share keys are rows of one product: (batch * key heads, heads * queries, ...).

    where: the queries. weights: softmax of the scores, in the inputs' dtype. query, key, value: what they come from.
    """

    where: slice
    weights: Tensor
    query: Tensor
    key: Tensor
    value: Tensor


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
    ) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        grouped = _grouped(output, key)
        for block in _blocks(query, key, value, mask, causal, scale):
            into = grouped[:, :, :, block.where]
            into.copy_(torch.bmm(block.weights, block.value).view(into.shape))
        ctx.save_for_backward(query, key, value, mask, output)
        ctx.causal, ctx.scale = causal, scale
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask, output = ctx.saved_tensors
        for_query = torch.empty_like(query, memory_format=torch.contiguous_format)
        for_key, for_value = (torch.zeros(t.shape, dtype=torch.float32).flatten(0, 1) for t in (key, value))
        grouped, grads = _grouped(for_query, key), _grouped(grad, key)
        along = _grouped((grad * output).sum(-1, keepdim=True, dtype=torch.float32).to(grad.dtype), key)
        room = _Room(query, key, query.dtype)
        for block in _blocks(query, key, value, mask, ctx.causal, ctx.scale):
            seen, into = block.key.shape[1], grouped[:, :, :, block.where]
            g = _rows(grads[:, :, :, block.where])
            for_value[:, :seen] += torch.bmm(block.weights.mT, g)
            s = torch.bmm(g, block.value.mT, out=room.of(*block.weights.shape))
            s.sub_(_rows(along[:, :, :, block.where])).mul_(block.weights)
            into.copy_(torch.bmm(s, block.key).view(into.shape))
            for_key[:, :seen] += torch.bmm(s.mT, block.query)
        for_key.mul_(ctx.scale)
        return (
            for_query.mul_(ctx.scale),
            for_key.to(key.dtype).view(key.shape),
            for_value.to(value.dtype).view(value.shape),
            None,
            None,
            None,
        )


class _Room:
    """Memory for what has the scores' shape, taken once: fresh pages would cost as much as the products."""

    def __init__(self, query: Tensor, key: Tensor, dtype: torch.dtype) -> None:
        rows = query.shape[0] * query.shape[1] * min(QUERIES, query.shape[2])
        self._values = query.new_empty(rows * key.shape[2], dtype=dtype)

    def of(self, *shape: int) -> Tensor:
        """A tensor of this shape in this memory."""
        return self._values[: math.prod(shape)].view(shape)


def _grouped(values: Tensor, key: Tensor) -> Tensor:
    """(batch, heads, queries, ...) -> (batch, key heads, heads that share a key, queries, ...), the same memory."""
    grouped: Tensor = values.unflatten(1, (key.shape[1], -1))
    return grouped


def _rows(values: Tensor) -> Tensor:
    """(batch, key heads, heads, queries, width) -> (batch * key heads, heads * queries, width)."""
    rows: Tensor = values.flatten(2, 3).flatten(0, 1)
    return rows


def _blocks(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> Iterator[_Block]:
    """The queries block by block; the weights of one are gone when the next comes."""
    queries, keys = query.shape[2], key.shape[2]
    grouped, flat_key, flat_value = _grouped(query, key), key.flatten(0, 1), value.flatten(0, 1)
    factor = flat_key.float().mul(scale).mT
    wide = _Room(query, key, torch.float32)
    narrow = None if query.dtype == torch.float32 else _Room(query, key, query.dtype)
    if mask is not None:
        mask = mask.expand(*mask.shape[:-2], queries, keys)
        mask = mask.view(*[1] * (4 - mask.dim()), *mask.shape)
        mask = mask.unsqueeze(2) if mask.shape[1] == 1 else _grouped(mask, key)
    for begin in range(0, queries, QUERIES):
        where = slice(begin, min(begin + QUERIES, queries))
        seen = min(where.stop, keys) if causal else keys
        block = grouped[:, :, :, where]
        q = _rows(block)
        scores = wide.of(*q.shape[:2], seen)
        torch.bmm(q.float(), factor[:, :, :seen], out=scores)
        apart = scores.view(*block.shape[:-1], seen)
        if causal:
            late = torch.arange(begin, max(begin, seen)) > torch.arange(begin, where.stop)[:, None]
            apart[..., begin:].masked_fill_(late, -torch.inf)
        blind = None
        if mask is not None:
            shown = mask[..., where, :seen]
            if mask.dtype is torch.bool:
                apart.masked_fill_(~shown, -torch.inf)
            else:
                apart.add_(shown)
            blind = scores.amax(-1, keepdim=True) == -torch.inf
        torch.softmax(scores, -1, out=scores)
        if blind is not None:
            scores.masked_fill_(blind, 0)
        weights = scores if narrow is None else narrow.of(*scores.shape).copy_(scores)
        yield _Block(where, weights, q, flat_key[:, :seen], flat_value[:, :seen])
