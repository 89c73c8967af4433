"""The GPTQ and AWQ layouts: golden words from the real packers, and exact round trips of every scheme."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from auto_round.errors import FormatError
from auto_round.formats.layouts import (
    AWQ,
    COMPRESSED,
    GPTQ_RAW,
    GPTQ_RAW_INDEXED,
    GPTQ_V1,
    GPTQ_V1_INDEXED,
    Layout,
)
from auto_round.numerics.bitpack import unpack
from auto_round.qtensor import QTensor, plain_g_idx
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


def test_gptq_v1_writes_a_zero_point_of_zero_mirrored_and_reads_it_back() -> None:
    tensor = example(4)
    packed = GPTQ_V1.encode(tensor)
    assert words(packed["qzeros"][0, :2]) == ["76543210", "eedcba98"]  # z = 1..15, then 0 as 15
    assert packed["scales"][0, 14:17].tolist() == [0.5, -0.5, 0.5]
    column = torch.arange(32) * 5 % 16  # codes of output 15 less 45, mirrored to 15 - q
    codes = unpack(packed["qweight"].t(), 4, 32)[15]
    assert torch.equal(codes[:16].long(), (15 - (column + 45) % 16)[:16])
    assert torch.equal(codes[16:].long(), ((column + 45) % 16)[16:])
    assert GPTQ_V1.decode(packed, tensor.scheme, 32).same(tensor)


def test_what_mirroring_could_not_tell_apart_is_refused() -> None:
    tensor = example(4)
    for zero in (0, 15):
        zeros = torch.full_like(tensor.zero_points(), zero)
        with pytest.raises(FormatError, match=r"negative scale.*gptq_v2"):
            GPTQ_V1.encode(QTensor(tensor.codes, -tensor.scales, zeros, tensor.scheme))


@pytest.mark.parametrize(
    ("bits", "stored"),
    [
        (2, "e3e3e3e4 e3e3e3e4"),
        (3, "88fac688 c688fac6 fac688fa"),
        (4, "76543210 fedcba98 76543210 fedcba98"),
        (8, " ".join(f"{sum((4 * i + j) << 8 * j for j in range(4)):08x}" for i in range(8))),
    ],
)
def test_zero_points_of_zero_as_gptqmodel_writes_them_in_v1(bits: int, stored: str) -> None:
    """It subtracts 1 from every field of a whole word (3 bits: from each field), so that 0 borrows from the next."""
    row = [int(word, 16) for word in stored.split()]
    qzeros = torch.tensor([row, row]).to(torch.int32)
    read = GPTQ_V1.decode({**GPTQ_RAW.encode(example(bits)), "qzeros": qzeros}, Scheme(bits, 16, sym=False), 32)
    assert torch.equal(read.zero_points()[:, 0], example(bits).zero_points()[:, 0])


@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    sym=st.booleans(),
    group=st.sampled_from([-1, 16, 32, 48, 128]),
    rows=st.sampled_from([32, 96]),
    columns=st.sampled_from([32, 96, 160]),
    layout=st.sampled_from([GPTQ_V1, GPTQ_RAW, GPTQ_V1_INDEXED, GPTQ_RAW_INDEXED, AWQ, COMPRESSED]),
    act_order=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_layer_comes_back_bit_for_bit(
    bits: int, sym: bool, group: int, rows: int, columns: int, layout: Layout, act_order: bool, seed: int
) -> None:
    scheme = Scheme(bits, group, sym=sym)
    if layout.refuse(scheme, rows, columns):
        assert layout in (AWQ, COMPRESSED)
        return
    g = torch.Generator().manual_seed(seed)
    grid = (rows, scheme.group_count(columns))
    scales = torch.randn(grid, generator=g).half()
    tensor = QTensor(
        torch.randint(0, 2**bits, (rows, columns), generator=g).to(torch.uint8),
        scales if sym else scales.abs(),
        None if sym else torch.randint(0, 2**bits, grid, generator=g).to(torch.uint8),
        scheme,
        _shuffled(scheme, columns, g) if act_order else None,
    )
    if tensor.g_idx is not None and layout not in (GPTQ_V1_INDEXED, GPTQ_RAW_INDEXED):
        with pytest.raises(FormatError, match="act-order"):
            layout.encode(tensor)
        return
    packed = layout.encode(tensor)
    assert {k: (t.dtype, tuple(t.shape)) for k, t in packed.items()} == layout.specs(scheme, rows, columns)
    shapes = {k: tuple(t.shape) for k, t in packed.items()}
    assert layout.shape(shapes, bits, packed.__getitem__) == (rows, columns)
    assert layout.decode(packed, scheme, columns).same(tensor)
    slow = plain_weight(layout, packed, scheme, rows, columns)
    assert torch.equal(slow, tensor.dequantize())


def _shuffled(scheme: Scheme, columns: int, g: torch.Generator) -> torch.Tensor | None:
    g_idx = plain_g_idx(scheme, columns)[torch.randperm(columns, generator=g)]
    return None if torch.equal(g_idx, plain_g_idx(scheme, columns)) else g_idx


def field(stream: list[int], index: int, bits: int) -> int:
    """Field `index` of a stream of words, as one long number."""
    return (sum((word & 0xFFFFFFFF) << 32 * i for i, word in enumerate(stream)) >> index * bits) & ((1 << bits) - 1)


def plain_weight(
    layout: Layout, packed: dict[str, torch.Tensor], scheme: Scheme, rows: int, columns: int
) -> torch.Tensor:
    """The weight by the definitions in layouts.py, number by number for a few outputs; the others are copied."""
    bits, slots = scheme.bits, (0, 2, 4, 6, 1, 3, 5, 7)
    width = scheme.group_width(columns)
    weight = layout.decode(packed, scheme, columns).dequantize()
    for o in (0, rows // 2 + 5, rows - 1):
        for i in (0, 1, columns // 2 + 3, columns - 1):
            k = int(packed["g_idx"][i]) if "g_idx" in packed else i // width
            if layout is COMPRESSED:
                q = field(packed["weight_packed"][o].tolist(), i, bits)
                scale = packed["weight_scale"][o, k]
                z = scheme.mid_code if scheme.sym else field(packed["weight_zero_point"][:, k].tolist(), o, bits)
            elif layout is AWQ:
                place = o // 8 * 8 + slots.index(o % 8)
                q, z = field(packed["qweight"][i].tolist(), place, 4), field(packed["qzeros"][k].tolist(), place, 4)
                scale = packed["scales"][k, o]
            else:
                q = field(packed["qweight"][:, o].tolist(), i, bits)
                z = field(packed["qzeros"][k].tolist(), o, bits) + (layout in (GPTQ_V1, GPTQ_V1_INDEXED))
                scale = packed["scales"][k, o]
            weight[o, i] = float(scale) * (q - z)
    return weight


@pytest.mark.parametrize("shape", [(40, 64), (64, 40)])
def test_dimensions_that_words_cannot_hold_are_refused(shape: tuple[int, int]) -> None:
    assert "multiple of 32" in str(GPTQ_V1.refuse(Scheme(4, 32), *shape))


def test_awq_refuses_other_widths_and_short_groups() -> None:
    assert "4 bits only" in str(AWQ.refuse(Scheme(3, 32), 64, 64))
    assert "divide" in str(AWQ.refuse(Scheme(4, 64), 64, 96))


def test_a_wrong_symmetric_flag_is_found() -> None:
    with pytest.raises(FormatError, match="not all 8"):
        GPTQ_RAW.decode(GPTQ_RAW.encode(example(4)), Scheme(4, 16, sym=True), 32)


@pytest.mark.parametrize(
    ("bits", "row"), [(4, "3e94fa50 b61c72d8 3e94fa50 b61c72d8"), (3, "a878cea8 cea878ce 78cea878")]
)
def test_compressed_tensors_words(bits: int, row: str) -> None:
    tensor = example(bits)
    narrow = QTensor(tensor.codes[:16], tensor.scales[:16], tensor.zero_points()[:16], tensor.scheme)
    packed = COMPRESSED.encode(narrow)
    assert " ".join(words(packed["weight_packed"][0])) == row
    assert packed["weight_shape"].tolist() == [16, 32]
    if bits == 4:
        assert words(packed["weight_packed"][1]) == ["61c72d83", "e94fa50b", "61c72d83", "e94fa50b"]
        assert words(packed["weight_zero_point"]) == ["87654321", "98765432", "0fedcba9", "10fedcba"]


def test_compressed_tensors_hold_the_transposed_words_of_gptq() -> None:
    ours, theirs = COMPRESSED.encode(example(4)), GPTQ_RAW.encode(example(4))
    assert torch.equal(ours["weight_packed"], theirs["qweight"].t())
    assert torch.equal(ours["weight_zero_point"], theirs["qzeros"].t())


def test_compressed_tensors_pad_inputs_that_fill_no_word() -> None:
    codes = torch.arange(8 * 20).reshape(8, 20).remainder(16).to(torch.uint8)
    tensor = QTensor(codes, torch.ones(8, 1).half(), None, Scheme(4, -1))
    packed = COMPRESSED.encode(tensor)
    assert packed["weight_packed"].shape == (8, 3)
    assert COMPRESSED.decode(packed, tensor.scheme, 20).same(tensor)


def test_g_idx_counts_from_the_end_too_and_must_name_a_group() -> None:
    packed = GPTQ_RAW_INDEXED.encode(example(4))
    packed["g_idx"] = packed["g_idx"].flip(0)
    read = GPTQ_RAW.decode(packed, Scheme(4, 16, sym=False), 32)
    assert read.g_idx is not None
    assert torch.equal(read.dequantize()[:, 16], 0.5 * (read.codes[:, 16].float() - read.zero_points()[:, 0]))
    negative = {**packed, "g_idx": packed["g_idx"] - 2}
    assert GPTQ_RAW.decode(negative, Scheme(4, 16, sym=False), 32).same(read)
    with pytest.raises(FormatError, match=r"g_idx names groups outside 0 \.\. 1"):
        GPTQ_RAW.decode({**packed, "g_idx": packed["g_idx"] + 1}, Scheme(4, 16, sym=False), 32)


def test_act_order_is_a_permutation_of_the_inputs() -> None:
    g = torch.Generator().manual_seed(0)
    tensor = replace(example(4), g_idx=plain_g_idx(Scheme(4, 16), 32)[torch.randperm(32, generator=g)])
    plain, order = tensor.in_order()
    assert plain.g_idx is None
    assert torch.equal(plain.dequantize(), tensor.dequantize()[:, order])
    assert plain.out_of_order(order).same(tensor)
    lopsided = replace(tensor, g_idx=torch.zeros(32, dtype=torch.int32))
    with pytest.raises(FormatError, match="16 inputs in each group"):
        lopsided.in_order()


def test_scales_that_float16_cannot_hold_are_refused() -> None:
    tensor = example(4)
    with pytest.raises(FormatError, match="float32 scales do not fit float16"):
        AWQ.encode(replace(tensor, scales=tensor.scales.float() + 1e-6))
