"""Layers kept in bfloat16: the native product of one token, and where torch's own is used instead."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import tiny_llama
from tests.inference.test_load import opened, write_folder
from torch import nn
from torch.nn.functional import linear

from auto_round import AutoRoundConfig
from auto_round.inference import dense
from auto_round.inference.base import Reason
from auto_round.inference.dense import DenseLinear
from auto_round.inference.kernels import native

built = pytest.mark.skipif(isinstance(native.library(), Reason), reason="no C compiler when the package was installed")


@built
@pytest.mark.parametrize("shape", [(1, 1), (33, 64), (100, 199), (64, 896)], ids=str)
@pytest.mark.parametrize("isa", range(len(native.INSTRUCTION_SETS)), ids=native.INSTRUCTION_SETS.__getitem__)
def test_one_token_is_exact_but_for_the_rounding_of_its_result(isa: int, shape: tuple[int, int]) -> None:
    found = native.library()
    assert isinstance(found, native.Library)
    if isa not in found.isas:
        pytest.skip(f"this CPU has no {native.INSTRUCTION_SETS[isa]}")
    generator = torch.Generator().manual_seed(1)
    weight, x = (torch.randn(n, shape[1], generator=generator).bfloat16() for n in (shape[0], 1))
    bias = torch.randn(shape[0], generator=generator).bfloat16()
    for added in (None, bias):
        y = native.native_dense(x[None], weight, added, isa)
        exact = linear(x.double(), weight.double(), None if added is None else added.double())
        size = linear(x.double().abs(), weight.double().abs())  # what float32 sums round is a part of
        assert y.shape == (1, 1, shape[0])
        assert bool(((y[0].double() - exact).abs() <= exact.abs() * 2**-8 + size * 1e-6).all())


@built
def test_the_operator_and_its_fake() -> None:
    arguments = (torch.randn(1, 1, 40).bfloat16(), torch.randn(24, 40).bfloat16(), torch.randn(24).bfloat16())
    torch.library.opcheck(torch.ops.auto_round.dense_token.default, arguments)
    layer = nn.Linear(40, 24).bfloat16()
    layer.__class__ = DenseLinear
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(arguments[0])
        assert torch.equal(compiled, layer(arguments[0]))


@built
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_what_was_traced_with_one_token_takes_more() -> None:
    layer = nn.Linear(40, 24).bfloat16()
    x = torch.randn(3, 40).bfloat16()
    expected = layer(x)
    layer.__class__ = DenseLinear
    with torch.no_grad():
        assert torch.equal(torch.jit.trace(layer, torch.randn(1, 40).bfloat16())(x), expected)


@built
def test_the_kernel_is_used_for_lone_tokens_without_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    monkeypatch.setattr(dense, "native_dense", lambda x, weight, bias: used.append(x) or linear(x, weight, bias))
    layer = nn.Linear(40, 24, dtype=torch.bfloat16)
    layer.__class__ = DenseLinear
    x = torch.randn(2, 40, dtype=torch.bfloat16)
    layer(x[:1])
    with torch.no_grad():
        layer(x)
        layer.float()(x[:1].float())
        assert used == []
        layer.bfloat16()(x[:1])
    assert len(used) == 1


@built
def test_the_head_of_an_opened_folder_uses_it_unless_another_backend_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "LEAST_WEIGHTS", 1)
    write_folder(tmp_path, tiny_llama(tie_word_embeddings=True))
    model, plain = (
        opened(tmp_path, torch.bfloat16, quantization_config=AutoRoundConfig(backend=name))
        for name in ("auto", "torch")
    )
    assert (type(model.lm_head), type(plain.lm_head)) == (DenseLinear, nn.Linear)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    for name, saved in (("ours", model), ("plain", plain)):
        saved.save_pretrained(tmp_path / name)
    ours, torchs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "plain"))
    assert ours.keys() == torchs.keys()
    assert all(torch.equal(ours[name], torchs[name]) for name in ours)
