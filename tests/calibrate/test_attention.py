"""Attention in blocks of queries against torch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from auto_round.calibrate.attention import QUERIES, BlockedAttention, blocked_attention

LONG = 2 * QUERIES + 7


def inputs(heads: int, key_heads: int, queries: int, keys: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    draw = torch.Generator().manual_seed(heads + queries)
    shapes = ((2, heads, queries, 16), (2, key_heads, keys, 16), (2, key_heads, keys, 24))
    return [torch.randn(s, generator=draw).to(dtype).requires_grad_(True) for s in shapes]


def both(given: list[Tensor], **settings: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradients of torch and of ours."""
    found = []
    for attention in (scaled_dot_product_attention, blocked_attention):
        output = attention(*given, enable_gqa=True, **settings)
        draw = torch.Generator().manual_seed(1)
        grad = torch.randn(output.shape, generator=draw).to(output.dtype)
        found.append([output, *torch.autograd.grad(output, given, grad)])
    return found[0], found[1]


def masks(queries: int, keys: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    seen = torch.rand(2, 1, queries, keys, generator=draw) > 0.3
    seen[..., 0] = True
    of_heads = torch.rand(2, 6, queries, keys, generator=draw) > 0.5
    of_heads[..., 1] = True
    return {
        "bool": seen,
        "added": torch.randn(queries, keys, generator=draw),
        "heads": of_heads,
        "keys": seen[:, :, :1],
    }


@pytest.mark.parametrize("key_heads", [6, 2, 1])
@pytest.mark.parametrize(
    ("queries", "keys"), [(LONG, LONG), (5, 5), (LONG, 3 * QUERIES), (3 * QUERIES, LONG), (LONG, 3)]
)
@pytest.mark.parametrize("causal", [True, False])
def test_it_is_torch_s_attention(key_heads: int, queries: int, keys: int, causal: bool) -> None:
    for expected, got in zip(*both(inputs(6, key_heads, queries, keys), is_causal=causal), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["bool", "added", "heads", "keys"])
def test_masks(kind: str) -> None:
    mask = masks(LONG, LONG + 9)[kind]
    for expected, got in zip(*both(inputs(6, 2, LONG, LONG + 9), attn_mask=mask, scale=0.3), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_a_query_that_sees_nothing_gives_zeros() -> None:
    mask = torch.ones(LONG, LONG, dtype=torch.bool)
    mask[3] = False
    for expected, got in zip(*both(inputs(4, 4, LONG, LONG), attn_mask=mask), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_bfloat16_is_within_two_roundings_of_float32() -> None:
    given = inputs(6, 2, LONG, LONG, torch.bfloat16)
    exact, _ = both([t.detach().float().requires_grad_(True) for t in given], is_causal=True)
    _, ours = both(given, is_causal=True)
    for name, true, got in zip(("output", "query", "key", "value"), exact, ours, strict=True):
        assert float((got.float() - true).norm() / true.norm().detach()) < 2**-7, name


def test_the_mode_takes_calls_over_and_leaves_the_others() -> None:
    query, key, value = (t.detach() for t in inputs(4, 2, LONG, LONG))
    expected = blocked_attention(query, key, value, is_causal=True)
    with BlockedAttention():
        got = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        doubles = scaled_dot_product_attention(query.double(), key.double(), value.double(), enable_gqa=True)
    assert torch.equal(got, expected)
    assert doubles.dtype is torch.float64


def test_arguments_by_position() -> None:
    q, k, v = (torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    expected = scaled_dot_product_attention(q, k, v, None, 0.0, True)
    with BlockedAttention():
        torch.testing.assert_close(scaled_dot_product_attention(q, k, v, None, 0.0, True), expected)
