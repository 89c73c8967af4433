"""The module and the reference backend against dense weights, and the seam that repacking backends use."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tests.inference.test_load import random_qtensor
from torch import Tensor, nn

from auto_round.errors import BackendError, FormatError
from auto_round.formats.layouts import AWQ, GPTQ_RAW, GPTQ_V1, Layout
from auto_round.inference.backends import torch_reference
from auto_round.inference.backends.torch_reference import BACKEND
from auto_round.inference.base import Reason, Stored
from auto_round.inference.qlinear import QLinear
from auto_round.qtensor import QTensor
from auto_round.spec.scheme import Scheme


@dataclass(frozen=True)
class Transposed:
    """What `Repacking` computes from."""

    weight: Tensor  # (in, out)
    source: QTensor

    def qtensor(self) -> QTensor:
        return self.source


class Repacking:
    """A backend with a form of its own, as compiled kernels have."""

    name = "repacking"
    repacks = True
    rank = 5
    spellings: tuple[str, ...] = ()

    def supports(
        self, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
    ) -> Reason | None:
        return None

    def prepare(self, stored: Stored, dtype: torch.dtype) -> Transposed:
        tensor = stored.qtensor()
        return Transposed(tensor.dequantize(dtype).t().contiguous(), tensor)

    def linear(self, x: Tensor, prepared: Transposed, bias: Tensor | None) -> Tensor:
        return x @ prepared.weight if bias is None else x @ prepared.weight + bias


@pytest.mark.parametrize("chunk", [1, 1 << 20])
@pytest.mark.parametrize(
    ("layout", "scheme"), [(GPTQ_V1, Scheme(3, 64)), (GPTQ_RAW, Scheme(8, -1, False)), (AWQ, Scheme(4, 32))]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_forward_is_the_dense_layer(
    monkeypatch: pytest.MonkeyPatch, layout: Layout, scheme: Scheme, dtype: torch.dtype, chunk: int
) -> None:
    monkeypatch.setitem(torch_reference.CHUNK_WEIGHTS, "cpu", chunk)  # 1: 32 outputs at a time
    tensor = random_qtensor(160, 96, scheme, 1, seed=5)
    bias = nn.Parameter(torch.randn(160, generator=torch.Generator().manual_seed(6)))
    x = torch.randn(2, 7, 96, generator=torch.Generator().manual_seed(7)).to(dtype)
    y = QLinear.from_qtensor(tensor, layout, BACKEND, bias)(x)
    expected = x.double() @ tensor.dequantize(dtype).double().t() + bias.to(dtype).double()
    assert y.dtype is dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    torch.testing.assert_close(y.double(), expected, atol=tolerance, rtol=tolerance)


def test_weights_stay_packed_and_gradients_reach_the_input() -> None:
    layer = QLinear.from_qtensor(random_qtensor(64, 128, Scheme(2, 128), 1, seed=1), GPTQ_V1, BACKEND)
    assert sum(t.nbytes for t in layer.state_dict().values()) == 64 * 128 // 4 + 64 * 2 + 64 // 4
    x = torch.randn(3, 128, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.qtensor().dequantize().sum(0).expand(3, 128))
    assert list(layer.parameters()) == []


def test_a_backend_that_repacks_frees_the_file_s_tensors_and_saves_them_again() -> None:
    tensor = random_qtensor(64, 96, Scheme(3, 64, sym=False), 1, seed=2)
    bias = nn.Parameter(torch.randn(64))
    layer = QLinear.from_qtensor(tensor, GPTQ_V1, Repacking(), bias)
    assert [name for name, _ in layer.named_buffers()] == []
    x = torch.randn(4, 96)
    reference = QLinear.from_qtensor(tensor, GPTQ_V1, BACKEND, bias)
    torch.testing.assert_close(layer(x), reference(x))
    saved, expected = layer.state_dict(), reference.state_dict()
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in expected)
    torch.testing.assert_close(copy.deepcopy(layer)(x), reference(x))


def test_a_repacked_layer_refuses_inputs_from_another_device() -> None:
    layer = QLinear.from_qtensor(random_qtensor(32, 32, Scheme(4, 32), 1, seed=2), GPTQ_V1, Repacking(), name="head")
    with pytest.raises(BackendError, match=r"'head' is on cpu and its input on meta.*\.to\('meta'\)"):
        layer(torch.empty(1, 32, device="meta"))


@pytest.mark.parametrize("there", [Repacking(), BACKEND], ids=lambda b: b.name)
@pytest.mark.parametrize("here", [Repacking(), BACKEND], ids=lambda b: b.name)
def test_a_layer_that_is_moved_gets_the_best_backend_of_its_new_device(
    monkeypatch: pytest.MonkeyPatch, here: Any, there: Any
) -> None:
    """The CPU is where it comes to; the meta device stands in for where it was."""
    tensor = random_qtensor(64, 96, Scheme(3, 64, sym=False), 1, seed=2)
    layer = QLinear.from_qtensor(tensor, GPTQ_V1, here, nn.Parameter(torch.randn(64)), asked="any")
    x, saved = torch.randn(4, 96), layer.state_dict()
    expected, before = layer(x), layer.prepared
    asked = []

    def choose(*arguments: Any) -> Any:
        asked.append(arguments)
        return there

    monkeypatch.setattr("auto_round.inference.qlinear.choose", choose)
    layer.to("cpu")
    assert (layer.prepared, asked) == (before, [])
    layer._home = torch.device("meta")
    layer._apply(lambda t: torch.empty_like(t, device="cpu") if t.is_meta else t)
    assert asked == [("any", "", tensor.scheme, (64, 96), torch.float32, torch.device("cpu"))]
    assert layer.backend is there
    assert (layer.prepared is None) == (there is BACKEND)
    torch.testing.assert_close(layer(x), expected)
    assert layer.state_dict().keys() == saved.keys()
    assert all(torch.equal(layer.state_dict()[name], saved[name]) for name in saved)


def test_a_repacking_backend_refuses_offloaded_layers() -> None:
    layer = QLinear(32, 32, scheme=Scheme(4, 32), layout=GPTQ_V1, backend=Repacking(), name="layer")
    with pytest.raises(BackendError, match="offloaded"):
        layer.prepare(torch.float32)


def test_casting_scales_away_is_an_error_and_widening_them_is_not() -> None:
    layer = QLinear.from_qtensor(random_qtensor(32, 64, Scheme(4, 32), 1, seed=3), GPTQ_V1, BACKEND, name="layer")
    x = torch.randn(1, 64)
    expected = layer(x)
    assert torch.equal(copy.deepcopy(layer).float()(x), expected)
    with pytest.raises(BackendError, match="cast to bfloat16"):
        layer.to(torch.bfloat16)(x.bfloat16())


def test_only_marked_assignments_count_as_loaded() -> None:
    layer = QLinear(64, 32, scheme=Scheme(4, 32), layout=GPTQ_V1, backend=BACKEND)
    real = QLinear.from_qtensor(random_qtensor(32, 64, Scheme(4, 32), 1, seed=4), GPTQ_V1, BACKEND)
    for name, tensor in real.named_buffers():
        setattr(layer, name, tensor)
    assert layer.missing() == ["qweight", "qzeros", "scales"]
    marked = real.scales.clone()
    marked._is_hf_initialized = True  # type: ignore[attr-defined]
    layer.scales = marked
    assert layer.missing() == ["qweight", "qzeros"]
    layer.scales = real.scales.clone()  # a later move loses the mark
    assert layer.missing() == ["qweight", "qzeros"]
    marked = real.qzeros[:1].clone()  # half of the groups
    marked._is_hf_initialized = True  # type: ignore[attr-defined]
    layer.qzeros = marked
    assert layer.missing() == ["qweight", "qzeros"]


def test_bad_layers_are_named() -> None:
    tensor = random_qtensor(32, 64, Scheme(4, 32), 1, seed=4)
    broken = QTensor(tensor.codes, torch.full_like(tensor.scales, float("inf")), None, tensor.scheme)
    with pytest.raises(FormatError, match=r"'model\.head'.*infinity"):
        QLinear.from_qtensor(broken, GPTQ_V1, BACKEND, name="model.head")
    assert "64 -> 32, W4A16G32, torch_reference" in repr(QLinear.from_qtensor(tensor, GPTQ_V1, BACKEND))
