"""Packing against golden words from real GPTQ files and a slow plain reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from auto_round.numerics.bitpack import pack, packed_length, unpack

GOLDEN = {
    2: "e4e4e4e4 e4e4e4e4",
    3: "a878cea8 cea878ce 78cea878",
    4: "3e94fa50 b61c72d8 3e94fa50 b61c72d8",
    8: "0f0a0500 231e1914 37322d28 4b46413c 5f5a5550 736e6964 87827d78 9b96918c",
}


@pytest.mark.parametrize("bits", GOLDEN)
def test_words_are_those_of_gptq_files(bits: int) -> None:
    codes = (5 * torch.arange(32)) % 2**bits
    words = [f"{word & 0xFFFFFFFF:08x}" for word in pack(codes, bits).tolist()]
    assert " ".join(words) == GOLDEN[bits]


@given(bits=st.sampled_from([2, 3, 4, 8]), count=st.integers(1, 100), seed=st.integers(0, 1000))
def test_pack_is_the_little_endian_bit_stream_and_unpack_its_inverse(bits: int, count: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (count,), generator=torch.Generator().manual_seed(seed))
    stream = sum(code << (i * bits) for i, code in enumerate(codes.tolist()))
    expected = [(stream >> (32 * w)) & 0xFFFFFFFF for w in range(packed_length(count, bits))]
    words = pack(codes, bits)
    assert [w & 0xFFFFFFFF for w in words.tolist()] == expected
    assert unpack(words, bits, count).tolist() == codes.tolist()


def test_leading_dimensions_are_kept() -> None:
    codes = torch.randint(0, 8, (2, 5, 40), generator=torch.Generator().manual_seed(0))
    words = pack(codes, 3)
    assert words.shape == (2, 5, 4)
    assert torch.equal(words[1, 3], pack(codes[1, 3], 3))
    assert torch.equal(unpack(words, 3, 40).long(), codes)
