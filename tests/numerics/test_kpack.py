"""Block bytes against the gguf package's own decoder, and against bytes that ggml's quantiser wrote."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from auto_round.numerics.kpack import LAYOUTS, dequantise_blocks, pack_blocks, unpack_blocks
from auto_round.spec.blocks import BLOCK_SCHEMES, BlockScheme

TYPES = list(BLOCK_SCHEMES.values())

# ggml_quantize_chunk of x[i] = (((37 i + 11) mod 101) - 50) / 64: first block, in hexadecimal.
GOLDEN = {
    "q4_0": "402ef258be1379df359bf147ac0268ce248a",
    "q5_1": "532a40bab4b4a525f3bf6b27e2ae5a16d19d4904c07c38f3",
    "q8_0": "4d1e9dfb59b61472d02e8be947a50361be1c7ad73593f14fac0a68c62481df3d9af8",
    "q4_k": (
        "de168022fffffffafff8fafaceafbfbcc2278dd3499e055ab1167cc2388de449af056bb1277cd3389ee45aa0166bc22748ad0469c0157bd1"
        "379cf358ae046ac0268be2379df359be157ad1268ce248ada0156bc1278cd3489e045ab0167bc2378de349ae056ab1267cd2389de459af15"
        "268ce248ad0459b0157bd1379ce348ae046ac0267bd2379df359be156ac1268c"
    ),
}
GOLDEN_VALUES = {
    "q4_0": (-0.585938, 0.0, 0.585938, -0.488281),
    "q5_1": (-0.633026, -0.0401306, 0.552765, -0.435394),
    "q8_0": (-0.609158, -0.0307655, 0.547626, -0.45533),
    "q4_k": (-0.588558, -0.060442, 0.573298, -0.482935),
}


def random_rows(scheme: BlockScheme, rows: int = 24, blocks: int = 3) -> torch.Tensor:
    """Random bytes whose float16 fields are finite numbers."""
    generator = torch.Generator().manual_seed(0)
    data = torch.randint(0, 256, (rows, blocks, scheme.block_bytes), generator=generator, dtype=torch.uint8)
    position = 0
    for field, size in LAYOUTS[scheme.name].order:
        if field in "dm":
            values = torch.randn(rows, blocks, 1, generator=generator).half()
            data[..., position : position + size] = values.view(torch.uint8)
        position += size
    return data.flatten(1)


@pytest.mark.parametrize("scheme", TYPES, ids=lambda s: s.name)
def test_values_are_those_of_the_gguf_package_bit_for_bit(scheme: BlockScheme) -> None:
    data = random_rows(scheme)
    expected = gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[scheme.name.upper()])
    found = dequantise_blocks(unpack_blocks(data, scheme), scheme).numpy()
    assert np.array_equal(found.view(np.int32), expected.view(np.int32))
    assert found.shape == (24, 3 * scheme.size)


@pytest.mark.parametrize("scheme", TYPES, ids=lambda s: s.name)
def test_packing_is_the_inverse_of_unpacking(scheme: BlockScheme) -> None:
    data = random_rows(scheme)
    assert torch.equal(pack_blocks(unpack_blocks(data, scheme), scheme), data)


@pytest.mark.parametrize("scheme", TYPES, ids=lambda s: s.name)
def test_sizes_are_those_of_the_gguf_package(scheme: BlockScheme) -> None:
    size, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[scheme.name.upper()]]
    assert (scheme.size, scheme.block_bytes) == (size, nbytes)
    assert sum(count for _, count in LAYOUTS[scheme.name].order) == nbytes


@pytest.mark.parametrize("name", list(GOLDEN))
def test_blocks_written_by_ggml_decode_to_its_values(name: str) -> None:
    data = torch.frombuffer(bytearray.fromhex(GOLDEN[name]), dtype=torch.uint8)[None]
    scheme = BLOCK_SCHEMES[name]
    fields = unpack_blocks(data, scheme)
    values = dequantise_blocks(fields, scheme)[0]
    assert values[:4].tolist() == pytest.approx(GOLDEN_VALUES[name], rel=1e-5)
    assert torch.equal(pack_blocks(fields, scheme), data)
