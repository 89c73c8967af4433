"""Attention in blocks of queries against torch's own."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from tests.conftest import each_path
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from auto_round.calibrate.attention import QUERIES, BlockedAttention, _Attention, blocked_attention
from auto_round.calibrate.tiled import TiledAttention, compiled_attention, fits

LONG = 2 * QUERIES + 7

compiled = compiled_attention()
path_of_this_cpu = each_path(compiled)


def inputs(
    heads: int,
    key_heads: int,
    queries: int,
    keys: int,
    dtype: torch.dtype = torch.float32,
    width: int = 24,
    key_width: int = 16,
) -> list[Tensor]:
    """Queries, keys of `key_width` and values of `width`, their tokens beside each other as models have them."""
    draw = torch.Generator().manual_seed(heads + queries)
    shapes = ((2, queries, heads, key_width), (2, keys, key_heads, key_width), (2, keys, key_heads, width))
    drawn = (torch.randn(s, generator=draw).to(dtype).transpose(1, 2) for s in shapes)
    return [values.requires_grad_(True) for values in drawn]


def tiled(path: int, *given: Tensor, **settings: Any) -> Tensor:
    scale = settings.get("scale") or given[0].shape[-1] ** -0.5
    output: Tensor = TiledAttention.apply(
        *given, settings.get("attn_mask"), settings.get("is_causal", False), scale, path
    )
    return output


def both(
    given: list[Tensor], ours: Callable[..., Tensor] = blocked_attention, **settings: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradients of torch and of ours."""
    found = []
    for attention in (scaled_dot_product_attention, ours):
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
        "expanded": seen[:1].expand(2, -1, -1, -1),
    }


@pytest.mark.parametrize("key_heads", [6, 2, 1])
@pytest.mark.parametrize(
    ("queries", "keys"), [(LONG, LONG), (5, 5), (LONG, 3 * QUERIES), (3 * QUERIES, LONG), (LONG, 3)]
)
@pytest.mark.parametrize("causal", [True, False])
def test_it_is_torch_s_attention(key_heads: int, queries: int, keys: int, causal: bool) -> None:
    for expected, got in zip(*both(inputs(6, key_heads, queries, keys), is_causal=causal), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["bool", "added", "heads", "keys", "expanded"])
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


@path_of_this_cpu
@pytest.mark.parametrize("key_heads", [6, 2, 1])
@pytest.mark.parametrize(("queries", "keys"), [(LONG, LONG), (5, 5), (LONG, 3 * QUERIES), (3 * QUERIES, LONG)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("key_width", "width"), [(16, 16), (48, 144), (256, 80)])
def test_tiles(path: int, key_heads: int, queries: int, keys: int, causal: bool, key_width: int, width: int) -> None:
    given = inputs(6, key_heads, queries, keys, width=width, key_width=key_width)
    for expected, got in zip(*both(given, partial(tiled, path), is_causal=causal), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@path_of_this_cpu
@pytest.mark.parametrize("kind", ["bool", "added", "heads", "keys", "expanded"])
def test_tiles_under_masks(path: int, kind: str) -> None:
    mask = masks(LONG, LONG + 9)[kind]
    given = inputs(6, 2, LONG, LONG + 9, width=32)
    for expected, got in zip(*both(given, partial(tiled, path), attn_mask=mask, scale=0.3), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@path_of_this_cpu
def test_tiles_where_a_query_sees_nothing(path: int) -> None:
    mask = torch.ones(LONG, LONG, dtype=torch.bool)
    mask[3] = False
    for expected, got in zip(
        *both(inputs(4, 4, LONG, LONG, width=16), partial(tiled, path), attn_mask=mask), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@path_of_this_cpu
def test_scores_of_any_size(path: int) -> None:
    query, key, value = (t.detach() for t in inputs(2, 2, LONG, LONG, width=16))
    for scale in (1e-30, 1.0, 1e2):  # scores of some hundreds are known to 1e-4
        exact = scaled_dot_product_attention(query.double(), key.double(), value.double(), scale=scale)
        got = tiled(path, query, key, value, scale=scale)
        torch.testing.assert_close(got, exact.float(), rtol=1e-3, atol=1e-3)


@path_of_this_cpu
def test_a_row_that_a_mask_makes_as_low_as_numbers_go_keeps_its_gradients(path: int) -> None:
    """As additive masks have it for a query of padding: all its keys count the same."""
    mask = torch.zeros(LONG, LONG)
    mask[5] = torch.finfo(torch.float32).min
    given = inputs(2, 2, LONG, LONG, width=16)
    scale = given[0].shape[-1] ** -0.5
    draw = torch.randn(2, 2, LONG, 16, generator=torch.Generator().manual_seed(1))
    found = []
    for output in (_Attention.apply(*given, mask, False, scale), tiled(path, *given, attn_mask=mask)):
        found.append([output, *torch.autograd.grad(output, given, draw)])
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@path_of_this_cpu
def test_a_gradient_of_any_layout(path: int) -> None:
    given = inputs(6, 2, LONG, LONG, width=32)
    draw = torch.Generator().manual_seed(1)
    by_tokens = torch.randn(2, LONG, 6, 32, generator=draw).transpose(1, 2)
    turned = torch.randn(2, 6, 32, LONG, generator=draw).mT
    for grad in (by_tokens, turned, torch.ones(()).expand(2, 6, LONG, 32)):
        output = tiled(path, *given, is_causal=True)
        expected = torch.autograd.grad(_Attention.apply(*given, None, True, 0.25), given, grad.contiguous())
        for true, got in zip(expected, torch.autograd.grad(output, given, grad), strict=True):
            torch.testing.assert_close(got, true, rtol=1e-4, atol=1e-5)


@path_of_this_cpu
def test_tiles_do_not_depend_on_threads(path: int) -> None:
    given, threads, found = inputs(6, 2, LONG, LONG, width=32), torch.get_num_threads(), []
    try:
        for count in (1, 2, 16):
            torch.set_num_threads(count)
            found.append(both(given, partial(tiled, path), is_causal=True)[1])
    finally:
        torch.set_num_threads(threads)
    for one, two, many in zip(*found, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, many)


def test_what_the_tiles_take() -> None:
    query, key, value = inputs(4, 2, LONG, LONG, width=32)
    assert fits(query, key, value, None) == (compiled is not None)
    taken = blocked_attention(query, key, value)
    assert taken.grad_fn is not None
    assert ("Tiled" in taken.grad_fn.name()) == (compiled is not None)
    assert not fits(query.bfloat16(), key.bfloat16(), value.bfloat16(), None)
    assert not fits(query, key, value[..., :24], None)
    assert not fits(query, key, value, torch.ones(LONG, device="meta"))
    assert not fits(query, key[:, :, :0], value[:, :, :0], None)
    for wrong in ((query, key, value[:, :, 1:]), (query, key[..., :8], value), (query, key[:1], value[:1])):
        assert not fits(*wrong, None)
    with pytest.raises(RuntimeError):
        blocked_attention(query, key, value[:, :, 1:])


def test_torch_compile_traces_it_without_the_tiles() -> None:
    given = [t.detach() for t in inputs(4, 2, LONG, LONG, width=16)]
    whole = torch.compile(blocked_attention, fullgraph=True, backend="eager")
    torch.testing.assert_close(whole(*given, is_causal=True), blocked_attention(*given, is_causal=True))


def test_the_tiles_are_built_where_there_is_a_compiler() -> None:
    assert compiled is not None or not any(map(shutil.which, ("cc", "gcc", "clang")))
