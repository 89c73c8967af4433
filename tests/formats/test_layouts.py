"""The GPTQ and AWQ layouts: golden words from the real packers, and exact round trips of every scheme."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from auto_round.errors import FormatError
from auto_round.formats.layouts import AWQ, GPTQ_RAW, GPTQ_V1, Layout
from auto_round.qtensor import QTensor
from auto_round.spec.scheme import Scheme


def words(tensor: torch.Tensor) -> list[str]:
    return [f"{word & 0xFFFFFFFF:08x}" for word in tensor.flatten().tolist()]


def example(bits: int, *, sym: bool = False) -> QTensor:
    """codes (5i + 3o) mod 2^b, zero points (o + k + 1) mod 2^b, 32 x 32 with groups of 16: made in other software."""
    o, i, k = torch.arange(32)[:, None], torch.arange(32)[None], torch.arange(2)[None]
    codes = ((5 * i + 3 * o) % 2**bits).to(torch.uint8)
    zeros = None if sym else ((o + k + 1) % 2**bits).to(torch.uint8)
    return QTensor(codes, torch.full((32, 2), 0.5, dtype=torch.float16), zeros, Scheme(bits, 16, sym=sym))


@pytest.mark.parametrize(
    ("bits", "qweight", "qzeros"),
    [
        (2, "e4e4e4e4 e4e4e4e4", "39393939 39393939"),
        (3, "a878cea8 cea878ce 78cea878", "d11f58d1 58d11f58 1f58d11f"),
        (4, "3e94fa50 b61c72d8 3e94fa50 b61c72d8", "87654321 0fedcba9 87654321 0fedcba9"),
    ],
)
def test_raw_gptq_words(bits: int, qweight: str, qzeros: str) -> None:
    packed = GPTQ_RAW.encode(example(bits))
    assert " ".join(words(packed["qweight"][:, 0])) == qweight
    assert " ".join(words(packed["qzeros"][0])) == qzeros
    assert packed["scales"].shape == (2, 32)


@pytest.mark.parametrize(
    ("bits", "word"),
    [(2, {"55555555"}), (3, {"db6db6db", "b6db6db6", "6db6db6d"}), (4, {"77777777"}), (8, {"7f7f7f7f"})],
)
def test_symmetric_gptq_v1_zero_points_are_the_constants_readers_expect(bits: int, word: set[str]) -> None:
    assert set(words(GPTQ_V1.encode(example(bits, sym=True))["qzeros"])) == word


def test_awq_words() -> None:
    packed = AWQ.encode(example(4))
    assert words(packed["qweight"][0]) == ["5f932c60", "d71ba4e8", "5f932c60", "d71ba4e8"]
    assert words(packed["qzeros"][0]) == ["86427531", "0ecafdb9", "86427531", "0ecafdb9"]


def test_gptq_v1_refuses_a_zero_point_of_zero() -> None:
    with pytest.raises(FormatError, match="zero point of 0"):
        GPTQ_V1.encode(example(4))


@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    sym=st.booleans(),
    group=st.sampled_from([-1, 16, 32, 48, 128]),
    rows=st.sampled_from([32, 96]),
    columns=st.sampled_from([32, 96, 160]),
    layout=st.sampled_from([GPTQ_V1, GPTQ_RAW, AWQ]),
    seed=st.integers(0, 99),
)
def test_every_layer_comes_back_bit_for_bit(
    bits: int, sym: bool, group: int, rows: int, columns: int, layout: Layout, seed: int
) -> None:
    scheme = Scheme(bits, group, sym=sym)
    if layout.refuse(scheme, rows, columns):
        assert layout is AWQ
        return
    g = torch.Generator().manual_seed(seed)
    grid = (rows, scheme.group_count(columns))
    low = 1 if layout is GPTQ_V1 else 0
    tensor = QTensor(
        torch.randint(0, 2**bits, (rows, columns), generator=g).to(torch.uint8),
        torch.randn(grid, generator=g).half(),
        None if sym else torch.randint(low, 2**bits, grid, generator=g).to(torch.uint8),
        scheme,
    )
    packed = layout.encode(tensor)
    assert {k: (t.dtype, tuple(t.shape)) for k, t in packed.items()} == layout.specs(scheme, rows, columns)
    assert layout.decode(packed, scheme, columns).same(tensor)


@pytest.mark.parametrize("shape", [(40, 64), (64, 40)])
def test_dimensions_that_words_cannot_hold_are_refused(shape: tuple[int, int]) -> None:
    assert "multiple of 32" in str(GPTQ_V1.refuse(Scheme(4, 32), *shape))


def test_awq_refuses_other_widths_and_short_groups() -> None:
    assert "4 bits only" in str(AWQ.refuse(Scheme(3, 32), 64, 64))
    assert "divide" in str(AWQ.refuse(Scheme(4, 64), 64, 96))


def test_a_wrong_symmetric_flag_is_found() -> None:
    with pytest.raises(FormatError, match="not all 8"):
        GPTQ_RAW.decode(GPTQ_RAW.encode(example(4)), Scheme(4, 16, sym=True), 32)
